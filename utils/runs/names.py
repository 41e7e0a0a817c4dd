"""Names of folders in that of a run."""

CHECKPOINTS = "checkpoints"
DAMAGED = "damaged_checkpoints"
SNAPSHOTS = "ema_snapshots"

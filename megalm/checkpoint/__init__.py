"""Checkpoints: sharded safetensors files and a JSON manifest with checksums, renamed into place last; no pickle.

manifest    the format, and finding the newest complete checkpoint
save        write, commit, keep the last k
load        verify everything, then copy by box intersection
"""

from megalm.checkpoint.manifest import CheckpointManifest, DamagedCheckpoint, complete, latest, read_manifest
from megalm.checkpoint.reader import load
from megalm.checkpoint.writer import save

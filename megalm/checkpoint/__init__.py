"""Checkpoints: sharded safetensors files and a JSON manifest with checksums, renamed into place last; no pickle.

manifest    the format, and finding the newest complete checkpoint
shard       what a rank holds of a tensor
save        write, commit, keep the last k
load        verify everything, then copy by box intersection, into any layout
ranks       how all ranks come to the same end
"""

from megalm.checkpoint.manifest import CheckpointManifest, DamagedCheckpoint, complete, latest, read_manifest
from megalm.checkpoint.reader import candidates, load
from megalm.checkpoint.shard import Shard, whole
from megalm.checkpoint.writer import save

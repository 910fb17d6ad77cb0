"""Checkpoints: sharded safetensors files and a JSON manifest with checksums, put in place last; no pickle.

manifest    the format, and finding the newest complete checkpoint
places      directories, and what fsspec reaches
stores      drafts, commits and deletions
shard       what a rank holds of a tensor, and what it saves of that
writer      save, at once or in the background
reader      verify everything, then copy by box intersection, into any layout
ranks       how all ranks come to the same end
inspect     what is in a checkpoint, whether it is intact, how two differ
"""

from megalm.checkpoint.manifest import CheckpointManifest, DamagedCheckpoint, complete, latest, read_manifest
from megalm.checkpoint.places import Place, place
from megalm.checkpoint.reader import load, load_newest
from megalm.checkpoint.shard import Shard, whole
from megalm.checkpoint.writer import Saver, save

"""Models in Hugging Face's form: what a base checkpoint leaves as, and what one may come from.

architectures   a model section <-> a class of transformers and its config.json
names           our parameters <-> their tensors
exporter        a checkpoint -> safetensors shards and index
importer        safetensors -> our parameters
card            what a run was, in README.md
"""

from megalm.checkpoint.huggingface.architectures import architecture_of, from_config, to_config
from megalm.checkpoint.huggingface.card import model_card
from megalm.checkpoint.huggingface.exporter import export_weights, joined
from megalm.checkpoint.huggingface.importer import read_config, read_weights, taken_over
from megalm.checkpoint.huggingface.names import VOCABULARY, entries

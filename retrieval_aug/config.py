"""Defaults of every setting.

A file in `configs/` starts from `defaults()` and sets what differs. The dict
is locked, so a misspelt name is an error there and on the command line.
"""

from collections.abc import Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from retrieval_aug.common.errors import UserError

# In the order of the result table.
MODELS = (
  "linear",
  "mlp",
  "vote",
  "mean_knn",
  "rac",
  "retformer",
  "mam_paper",
  "mam",
)

# Of the train section: what is no single value, or does not change what a run
# computes.
NOT_SWEPT = ("lr_factors", "seeds", "seeds_at_once", "checkpoint_epochs")


def defaults() -> ml_collections.ConfigDict:
  """Every setting of the main job with its default, locked."""
  c = ml_collections.ConfigDict()
  # What to classify and what to retrieve from. A config file replaces this
  # section by `name` and that dataset's own options.
  c.dataset = ml_collections.ConfigDict({"name": "emoji"})

  # What to retrieve from: all sources that are named, as one memory.
  c.memory = ml_collections.ConfigDict()
  # Comma-separated: train, own, manifest, pairs, captions, embeddings; auto:
  # all that are given below, else own, else train.
  c.memory.sources = "auto"
  # Of a training image as memory item; {label} is its class, {text} its own
  # text where the dataset has some.
  c.memory.text = "a photo of {label}"
  c.memory.manifest = ""  # CSV/Parquet/JSONL of image,text (globs, commas)
  # What img2dataset wrote: webdataset tars, folders of files, TFRecord (globs,
  # commas).
  c.memory.pairs = ""
  c.memory.captions = ""  # a tensorflow-datasets set with captions
  c.memory.data_dir = ""  # of that
  # Folders of clip-retrieval / LAION, or of tables.
  c.memory.embeddings = ""
  c.memory.on_error = "fail"  # fail | skip what cannot be read
  c.memory.max_errors = 0.01  # share that may be skipped
  c.memory.digest = "stat"  # of files: stat | content; see datasets/images.py
  # Of texts: none | captions (entities, invisible characters, white space) |
  # web (addresses and names of image files, too); see encoders/prompts.py.
  c.memory.clean = "none"
  # Whether memory items that are near copies of val or test examples are left
  # out; of training examples, from their own neighbours.
  c.memory.exclude_leaks = False
  # Cosine, of keys less their mean, from which on images are compared.
  c.memory.leak_cosine = 0.5
  # Examples of each split that are looked at for copies; 0 is none, -1 is all,
  # as with exclude_leaks.
  c.memory.leak_sample = 500
  # Where the rows that neighbours name lie in training: replicated (a copy on
  # each device) | sharded (split over devices) | host (mapped from disk) |
  # auto: the first of these that fits. See docs/training.md.
  c.memory.placement = "auto"
  c.memory.dtype = "float16"  # there: float16 (as on disk) | bfloat16 | float32
  c.memory.filters = ml_collections.ConfigDict()
  c.memory.filters.min_size = 0  # pixels of the shorter side
  c.memory.filters.licenses = ""  # those that are kept, with commas
  c.memory.filters.nsfw_column = ""  # of scores, or of LAION's words
  c.memory.filters.max_nsfw = 0.5  # the highest score that is kept
  # Bits in which the hashes of two images may differ for the second to go;
  # 4 finds copies in other sizes, -1 is off. Opens each image at each start.
  c.memory.filters.near_duplicates = -1
  c.memory.filters.text_min = 0  # characters
  c.memory.filters.text_max = 0  # characters; 0 is off
  c.memory.filters.text_exclude = ""  # regex that no text may hold
  c.memory.filters.text_require = ""  # regex that each text must hold

  # One encoder for queries and keys; others for values, of texts or of images,
  # one section each under a name of your own. A config file replaces both.
  c.encoder = encoder("efficientnet_lite0")
  c.value_encoders = ml_collections.ConfigDict({"text": encoder("minilm_l6")})

  c.embed = ml_collections.ConfigDict()
  c.embed.batch_size = 64  # images an encoder sees at once; 0 finds it
  c.embed.memory_gb = 0.0  # of a device, for 0 above; 0 is a quarter of it
  c.embed.shard_rows = 1024  # a killed run redoes at most one shard
  c.embed.threads = 4  # that decode or render images
  # That do so instead, for images whose decoding holds Python's lock.
  c.embed.processes = 0
  # Each file of config.memory.pairs is listed and embedded on its own, by
  # whichever worker takes it; for memories that no one machine should list.
  c.embed.by_file = False

  c.search = ml_collections.ConfigDict()
  # auto | exact | ivf | scann | faiss_hnsw | faiss_ivf; auto takes what is
  # fastest by a measurement, with the recall asked for.
  c.search.searcher = "auto"
  c.search.k = 100
  c.search.key_transform = "none"  # none | center | pca | whiten
  c.search.key_dims = 0  # of pca and whiten; 0 keeps all
  c.search.recall_sample = 500  # queries on which recall is measured
  c.search.recall_target = 0.95  # of the searcher against exact search
  c.search.on_low_recall = "fail"  # fail | warn
  c.search.shard_rows = 16384  # examples a neighbour shard
  # Rows of the memory that one index is built over; 0: what memory_gb holds.
  c.search.index_rows = 0
  # For them, in 10^9 bytes; 0: half of what is free, shared among the groups.
  c.search.memory_gb = 0.0
  c.search.groups = 1  # workers that share the index shards
  # Of each searcher; 0 is tuned.
  c.search.ivf = ml_collections.ConfigDict({"lists": 0, "probes": 0})
  c.search.scann = ml_collections.ConfigDict(
    {
      "leaves": 0,
      "leaves_to_search": 0,
      "reorder": 0,
      "reorder_type": "float32",  # float32 | bfloat16 | int8
      "soar": False,
    }
  )
  c.search.faiss_hnsw = ml_collections.ConfigDict(
    {"m": 32, "ef_construction": 64, "ef_search": 0}
  )
  c.search.faiss_ivf = ml_collections.ConfigDict({"lists": 0, "probes": 0})

  # How arrays are split over devices; see docs/training.md.
  c.mesh = ml_collections.ConfigDict()
  c.mesh.model = 1  # devices that share a model; the others share a batch
  # Of parameters and optimizer state: replicate | fsdp | tensor, or (regex,
  # action) pairs: the first that matches a parameter's whole name.
  c.mesh.sharding = config_dict.FieldReference("replicate", field_type=object)

  # What is told of a run beside metrics.jsonl and metrics.csv.
  c.log = ml_collections.ConfigDict()
  c.log.tensorboard = True  # event files, in the run's folder
  c.log.wandb = ""  # project of Weights & Biases
  c.log.profile = ""  # steps to trace, such as 10:15

  c.train = ml_collections.ConfigDict()
  c.train.seeds = 3
  # That train together, in one compiled step: faster for small models where
  # there is one device.
  c.train.seeds_at_once = 1
  c.train.k = 100  # neighbours given to the model, at most search.k
  c.train.epochs = 10.0
  c.train.batch_size = 512
  c.train.learning_rate = 1e-3
  c.train.weight_decay = 0.2
  c.train.warmup_epochs = 1.0
  c.train.label_smoothing = 0.1
  # cross_entropy | lace | balanced_softmax | ldam | focal; see training/loss.py
  c.train.loss = "lace"
  c.train.tau = 1.0  # of the LACE loss; 0 is plain cross-entropy
  c.train.post_hoc_tau = 0.0  # of predictions instead; never with lace
  c.train.ldam_margin = 0.5  # of the rarest class
  c.train.ldam_scale = 30.0
  c.train.focal_gamma = 2.0
  c.train.reweighting = "none"  # none | class_balanced | deferred
  c.train.reweight_beta = 0.9999
  c.train.reweight_epoch = 0.0  # from which "deferred" weighs
  c.train.mixup = 0.0  # alpha of Mixup on what the heads see; 0 is off
  c.train.gradient_clip = 1.0  # global norm; 0 is off
  # (regex, factor) pairs: the first that matches a parameter's whole name
  # multiplies its learning rate. 0 keeps it as it was, and its gradient is not
  # computed. See `layer_decay`.
  c.train.lr_factors = ()
  # Trains the encoder of the queries too, whose parameters are `encoder/...`;
  # neighbours, keys and values stay those of the frozen one.
  c.train.finetune = False
  # Of its images: "none", or steps such as "inception_crop(0.5), flip,
  # randaugment(2, 9)"; see training/augment.py.
  c.train.augment = "none"
  # Images that the encoder sees at once within a batch; 0 is all of them. A
  # few need little memory, and a third more computation.
  c.train.encoder_batch = 0
  # Workdir of another run of this config: each model and seed begins with the
  # parameters that it ended with there.
  c.train.start_from = ""
  # How much of them is kept in the end, 0 to below 1: 0.5 is half way between.
  c.train.keep_start = 0.0
  c.train.checkpoint_epochs = 10.0
  c.train.eval_epochs = 0.0  # how often to look at val; 0 is never
  c.train.keep = "last"  # last | best on val: the parameters of the result
  # Parts of a batch that are computed one after the other.
  c.train.accumulate = 1
  c.train.ema = 0.0  # of the parameters: what stays in a step; 0 is off
  # Less memory for more computation: activations are computed again.
  c.train.remat = False

  # One section a model: its module's options, and `train`: what it trains
  # with where that differs from the section above (None: as above).
  c.model = ml_collections.ConfigDict()
  c.model.name = "all"  # all, or a comma-separated choice of MODELS
  for name in MODELS:
    section = ml_collections.ConfigDict(_model_options(name))
    section.train = ml_collections.ConfigDict()
    for key, value in c.train.items():
      section.train[key] = config_dict.placeholder(type(value))
    c.model[name] = section
  c.model.vote.train.seeds = 1  # nothing is drawn
  c.model.vote.train.finetune = False  # nothing is trained

  # Lists of values, with commas between them (or ; where a value has commas):
  # each model is trained with every combination. See docs/training.md.
  c.sweep = ml_collections.ConfigDict({"train": {}, "model": {}})
  for key in c.train:
    if key not in NOT_SWEPT:
      c.sweep.train[key] = config_dict.placeholder(str)
  for name in MODELS:
    for key in _model_options(name):
      c.sweep.model[key] = config_dict.placeholder(str)

  c.evaluate = ml_collections.ConfigDict()
  c.evaluate.batch_size = 512
  c.evaluate.shot_groups = "paper"  # paper | oltr_code

  c.report = ml_collections.ConfigDict()
  c.report.queries = 10  # rows of neighbors.png
  c.report.neighbors = 10  # columns of neighbors.png
  c.lock()
  return c


def encoder(name: str, **given: Any) -> ml_collections.ConfigDict:
  """The section of an encoder, with what can be set on the command line.

  Args:
    name: one of `encoders.names()`.
    **given: its options. Those that most encoders have stand in the section
      in any case, as None: what the weights themselves say, or its default.
  """
  kinds = {"checkpoint": str, "variant": str, "size": int, "dtype": str}
  c = ml_collections.ConfigDict({"name": name})
  for option, kind in kinds.items():
    c[option] = config_dict.placeholder(kind)
  # In whole, so that one that is not among these stands beside them.
  c.update(given)
  return c


def _model_options(name: str) -> dict[str, Any]:
  """The options of a model; `models.options` has the same, a test says so.

  Two are filled in from the data (`training/runs.py`): how many sources a
  `source_gate` tells apart, and how many neighbors RetFormer has.
  """
  if name == "vote":
    return {"kind": "similarity", "temperature": 0.07}
  common = {
    "input_scale": "sqrt_d",
    "value_scale": "sqrt_d",
    "dtype": "float32",
    "param_dtype": "float32",
  }
  mlp = {"activation": "relu", "dropout": 0.0}
  attention = {"neighbor_dropout": 0.0, "dropout": 0.0}
  mam = {
    **attention,
    "cosine": False,
    "num_layers": 2,
    "residual": "previous",
    "share_layers": False,
    "qk_init": "identity",
    "value_fusion": "concatenate",
    "num_heads": 1,
    "norm": config_dict.placeholder(str),
    # A number, or "learned".
    "attention_temperature": config_dict.FieldReference(1.0, field_type=object),
    "source_gate": False,
    "query_dropout": 0.0,
    "remat": False,
    "scan_layers": False,
    "neighbor_dropout": 0.5,
  }
  mam_paper = mam | {
    "num_layers": 8,
    "residual": "query",
    "share_layers": True,
    "qk_init": "lecun_normal",
    "neighbor_dropout": 0.0,
  }
  retformer = {
    "cosine": False,
    "tau": 1.0,
    "num_layers": 4,
    "block": "literal",
    "text_stream": "cross",
    "streams": "both",
    "position": "learned",
    "num_heads": 1,
    "feedforward_dim": config_dict.placeholder(int),
    "branch_hidden_dim": config_dict.placeholder(int),
    **{f"branch_{option}": value for option, value in mlp.items()},
    **attention,
  }
  return (
    common
    | {
      "linear": {"cosine": False},
      "mlp": {"hidden_dim": config_dict.placeholder(int), **mlp},
      "mean_knn": {"cosine": False, "query_dropout": 0.0, **attention},
      "rac": {"cosine": False, "branch_cosine": False, "tau": 2.0},
      "retformer": retformer,
      "mam_paper": mam_paper,
      "mam": mam,
    }[name]
  )


def layer_decay(
  layers: Sequence[str], factor: float, decay: float
) -> tuple[tuple[str, float], ...]:
  """Pairs for `train.lr_factors`: the lower a layer, the less it changes.

  Of EfficientNet-Lite0, with a tenth of the learning rate at the top:

    c.train.lr_factors = config.layer_decay(
      [
        r"encoder/conv_stem/.*",
        *(rf"encoder/blocks_{i}/.*" for i in range(16)),
        r"encoder/conv_head/.*",
      ],
      factor=0.1,
      decay=0.8,
    )

  Args:
    layers: regexes of the names of each layer's parameters, lowest first.
    factor: of the last of them.
    decay: of each, as a part of the one above it.
  """
  top = len(layers) - 1
  return tuple(
    (layer, factor * decay ** (top - i)) for i, layer in enumerate(layers)
  )


def arguments(text: str | None, **known: Any) -> dict[str, Any]:
  """Reads the argument of a config file: `--config=FILE:NAME=VALUE,...`.

  Args:
    text: what stands after the colon, or None.
    **known: each name with its default; a value gets the default's type.

  Raises:
    UserError: an unknown name, or a value of another type.
  """
  found = dict(known)
  for part in filter(None, (text or "").split(",")):
    name, equals, value = part.partition("=")
    if name not in known or not equals:
      raise UserError(
        f"{part!r}: this config file takes NAME=VALUE of "
        f"{', '.join(f'{n}={v}' for n, v in known.items())}."
      )
    try:
      found[name] = as_type(type(known[name]), value)
    except ValueError as error:
      raise UserError(f"{part!r}: {error}.") from error
  return found


def as_type(kind: type, text: str) -> Any:
  """The value that a text stands for.

  Args:
    kind: bool, int, float or str.
    text: as on the command line.

  Raises:
    ValueError: it is of another type.
  """
  if kind is not bool:
    return kind(text)
  if text not in ("True", "False"):  # bool("False") is True
    raise ValueError("expected True or False")
  return text == "True"

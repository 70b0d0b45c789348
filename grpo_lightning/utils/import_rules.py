"""What a config may name: anything of the user's own, and of libraries only what is listed here.

Calling or constructing something of Python's standard library, or of the libraries around this package, can
run commands, fetch and unpickle files, or rebuild any other function (`os.system`, `numpy.load`,
`functools.partial`, `torch.hub.load`). Those libraries are closed but for the rows of `ALLOWED_FUNCTIONS`
and `ALLOWED_CLASSES`; of rows that cover a name the longest decides. A net for pasted configs, not a
sandbox: what a config names of the user's own gets imported, so a config is as trusted as a script.
"""

import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

_LIBRARIES = """
IPython PIL absl accelerate aiohttp anyio asyncssh cffi cloudpickle compressed_tensors datasets deepspeed
diffusers dill execnet fabric fire fsspec gcsfs gguf gradio grpc h5py httpcore httpcore2 httpx httpx2
huggingface_hub hydra invoke ipykernel jinja2 joblib jsonargparse jsonpickle keras lightning
lightning_fabric lightning_utilities litlogger litmodels llvmlite loky mako matplotlib mistral_common mlflow
multiprocess networkx nltk numba numexpr numpy omegaconf onnx onnxruntime openai optimum pandas papermill
paramiko peft pexpect pip pkg_resources plumbum polars psutil ptyprocess pyarrow pydantic pytest
pytorch_lightning ray requests rich ruamel s3fs safetensors scipy sentence_transformers setproctitle
setuptools sh skops sklearn sqlalchemy submitit sympy tensorboard tensorflow tokenizers toolz torch
torchaudio torchdata torchgen torchvision transformers triton trl unsloth urllib3 uvicorn virtualenv vllm
wandb werkzeug xarray yaml zmq
grpo_lightning.__main__ grpo_lightning.cli grpo_lightning.policy.loading grpo_lightning.policy.model_source
grpo_lightning.utils
"""

CLOSED = frozenset(sys.stdlib_module_names) | frozenset(_LIBRARIES.split())
"""modules of which nothing may be named but what a row below covers"""

ALLOWED_FUNCTIONS = frozenset({"torch.nn"})
"""rows for rewards, datasets and losses, which are called with arguments of the config's choice"""

ALLOWED_CLASSES = frozenset(
    {
        "lightning.fabric.plugins",
        "lightning.pytorch.accelerators",
        "lightning.pytorch.callbacks",
        "lightning.pytorch.cli.ReduceLROnPlateau",
        "lightning.pytorch.loggers",
        "lightning.pytorch.plugins",
        "lightning.pytorch.profilers",
        "lightning.pytorch.strategies",
        "torch.optim",
        "transformers.Adafactor",
        "transformers.optimization",
    }
)
"""rows for class paths, of which jsonargparse also checks the type"""


def is_allowed(path: str) -> bool:
    """True if a reward, dataset or loss may be `path`, dotted."""
    parts = path.replace(":", ".").split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    row = next((p for p in prefixes if p in CLOSED or p in ALLOWED_FUNCTIONS), None)
    return row is None or row in ALLOWED_FUNCTIONS


def origins(found: Any) -> Iterator[str]:
    """Yields where what would be called is defined, dotted; often not where it was named."""
    if isinstance(found, partial):
        yield from origins(found.func)
    elif isinstance(found, ModuleType):
        yield found.__name__
    elif callable(found):
        module = getattr(found, "__module__", None) or type(found).__module__
        yield f"{module}.{getattr(found, '__qualname__', type(found).__qualname__)}"

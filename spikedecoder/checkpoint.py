"""A model as a folder: config.json, model.safetensors and, if the model has one, tokenizer.json.

Each file is written under a temporary name and renamed, so that a crash or a full disk leaves the old
file intact. Reading checks every file; an error says in one line what is wrong.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from spikedecoder._files import write_bytes, write_files
from spikedecoder._version import __version__
from spikedecoder.config import SpikeDecoderConfig
from spikedecoder.data.tokenizers import check_known, load_tokenizer
from spikedecoder.nn.made import changed, made

if TYPE_CHECKING:
    from spikedecoder.model import SpikeDecoder

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
_FORMAT = 1
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes that a model can run in
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_HUB = (
    "revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder", "endpoint",
    "proxies", "etag_timeout",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint cannot be read: it is missing, truncated, of another format, or lacks tensors."""


def write_json(path: Path, value: Any) -> None:
    """Write `value` as a JSON file, completely or not at all."""
    write_bytes(path, _json(value))


def _json(value: Any) -> bytes:
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: ASCII escapes can express it
        return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError if the file is missing, truncated or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise CheckpointError(f"{path}: not a JSON file, or truncated ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got a JSON {type(value).__name__}, takes an object")
    return value


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, completely or not at all; metadata: strings to keep with them."""
    write_bytes(path, _safetensors(tensors, metadata))


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    """Every tensor in full: those that share memory, such as tied weights, are each written."""
    written: set[int] = set()
    apart = {}
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        apart[name] = t.clone() if t.untyped_storage().data_ptr() in written else t
        written.add(t.untyped_storage().data_ptr())
    return save(apart, metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, on the CPU; CheckpointError if the file cannot be read."""
    try:
        with open(path, "rb") as file:  # safetensors would report any file it cannot open as missing
            try:
                str(path).encode()
            except UnicodeEncodeError:  # safetensors rejects a path that is not UTF-8
                return load(file.read())
            return load_file(path)
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated ({error})") from None


def load_state(model: SpikeDecoder, tensors: dict[str, Tensor], source: object) -> None:
    """Load weights by name; each parameter takes the dtype of its stored tensor.

    Raises CheckpointError naming tensors that are missing, unknown, or of the wrong shape or kind.
    """
    _check_fit(model, tensors, source)
    if "head.linear.weight" in tensors:  # for what is not in the file: decays are float64 in a float64 model
        model.to(tensors["head.linear.weight"].dtype)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if name in tensors and t.is_floating_point():  # norms may be wider than their inputs
            t.data = t.data.to(tensors[name].dtype)
    model.load_state_dict(tensors)


def _check_fit(model: SpikeDecoder, tensors: dict[str, Tensor], source: object) -> None:
    if problems := _misfits(model.state_dict(), tensors):
        raise CheckpointError(f"{source}: weights do not fit the config: {problems}")


def _misfits(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> str:
    """Which tensors are missing, unknown or do not fit the model's `own`, in words; "" if all fit."""
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in own]
    both = [name for name in tensors if name in own]
    problems += [f"{name} {why}" for name in both if (why := _misfit(own[name], tensors[name]))]
    return "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")


def _misfit(own: Tensor, tensor: Tensor) -> str:
    """Why `tensor` cannot take the place of `own`, in words; "" if it can."""
    floats = own.is_floating_point()
    if tensor.layout != torch.strided:
        return f"of {tensor.layout}, takes strided".replace("torch.", "")
    if tensor.dtype not in (_FLOATS if floats else (*_FLOATS, *_INTEGERS)):  # counters may be any of these
        return f"of {tensor.dtype}, takes float16 to float64".replace("torch.", "")
    return "" if tensor.shape == own.shape else f"of shape {tuple(tensor.shape)} for {tuple(own.shape)}"


def save_folder(model: SpikeDecoder, folder: Path) -> None:
    """Write the model's files, replacing existing ones, all or none; weights last, so that a new folder with
    weights is complete. ValueError if the model could not be loaded again from them."""
    kind: Any = type(model)
    weights, files = model.state_dict(), {}
    if any(hasattr(t, "full_tensor") for t in weights.values()):
        raise ValueError(
            "model: holds only its part of the weights (DTensors, as FSDP makes them): load "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict into a model of its config, and save that"
        )
    if problems := _misfits(made(kind, model.config).state_dict(), weights):
        raise ValueError(
            f"model: holds other weights than its config makes ({problems}): no folder would bring it back; "
            "undo what changed its modules first, as torch.nn.utils.prune.remove, parametrize."
            "remove_parametrizations or an adapter's merge do, or keep model.state_dict() yourself"
        )
    if (other := changed(model, kind)) is not None:
        raise ValueError(
            f"model: is not what its config makes ({other}): no folder would bring that back; change it "
            "back, set it in the config, or keep model.state_dict() and what changes the model yourself"
        )
    if model.tokenizer is not None:
        check_known(model.tokenizer, "model.tokenizer")
        files[folder / TOKENIZER] = _json(model.tokenizer.to_dict())
    head = {"format": _FORMAT, "version": __version__, **model.config.to_dict()}
    files[folder / CONFIG] = _json(head)
    files[folder / WEIGHTS] = _safetensors(weights, {"format": "pt"})
    # a tokenizer that is there belongs to another model; a folder with none says so where one is needed
    write_files(files, remove=() if model.tokenizer is not None else (folder / TOKENIZER,))


def read_config(path: Path) -> SpikeDecoderConfig:
    """The configuration in a model's config.json; CheckpointError if it cannot be read or holds none."""
    values = read_json(path)
    found, version = values.pop("format", None), values.pop("version", __version__)
    other = "" if version == __version__ else f" (written by spikedecoder {version}, this is {__version__})"
    if found != _FORMAT:
        what = other or ": not a spikedecoder config"
        raise CheckpointError(f"{path}: got format {found!r}, takes {_FORMAT}{what}")
    try:
        return SpikeDecoderConfig.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}{other}") from None


_CARD = """---
library_name: spikedecoder
pipeline_tag: text-generation
tags:
- spiking-neural-network
---

# {name}

A language model of spiking neurons, trained with `spikedecoder`:

```python
from spikedecoder import SpikeDecoder

model = SpikeDecoder.from_pretrained("{repo_id}")
```
"""


class FolderMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for the files above.

    `from_pretrained` takes a folder, which needs no network, or a name on the Hugging Face hub. From a
    training run's folder it loads the best model or, without one, the last.
    """

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model's files into `folder`, creating it if needed.

        Raises ValueError for a model that its config would not bring back, as after pruning, with an
        adapter, or where sharding leaves this process only a part of the weights.
        """
        save_folder(cast("SpikeDecoder", self), Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        commit_message: str = "Upload model",
        create_pr: bool = False,
    ) -> str:
        """Upload the model's files to `repo_id` (OWNER/NAME or NAME), creating the repository if needed.

        A repository without a README.md gets a model card. Returns the address of the commit. Raises
        ConnectionError if the hub cannot be reached, the hub's own errors, and those of `save_pretrained`.
        """
        from huggingface_hub import HfApi  # takes half a second to import, and few need it
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi(token=token)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        except (HfHubHTTPError, ValueError):  # the hub says itself what is wrong
            raise
        except Exception as error:  # from requests or httpx, depending on the version of huggingface_hub
            raise ConnectionError(f"{repo_id}: the hub could not be reached ({error})") from error
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if not api.file_exists(repo_id, "README.md", revision=branch):
                card = _CARD.format(name=repo_id.rpartition("/")[2], repo_id=repo_id)
                write_bytes(Path(folder) / "README.md", card.encode())
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                delete_patterns=None if cast("SpikeDecoder", self).tokenizer else TOKENIZER,
                revision=branch,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        return str(commit)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", **hub: Any
    ) -> SpikeDecoder:
        """Load the model in folder `name`, or called `name` on the hub (OWNER/NAME), in evaluation mode.

        hub: options for `huggingface_hub.hf_hub_download`, such as revision and token; not used for a folder.

        Raises TypeError for other options, and CheckpointError (a ValueError) if there is no such model or it
        cannot be read.
        """
        if name == "":  # Path('') is the current folder
            raise ValueError("name: got '', takes a folder, or a name on the hub")
        if unknown := [option for option in hub if option not in _HUB]:
            raise TypeError(f"from_pretrained: got {unknown[0]!r}, takes name, device and {', '.join(_HUB)}")
        get = _local(Path(name)) if Path(name).is_dir() else _remote(str(name), hub)
        config = read_config(get(CONFIG))
        weights = get(WEIGHTS)
        tensors = read_tensors(weights)
        kind = cast("Callable[[SpikeDecoderConfig], SpikeDecoder]", cls)
        # before memory is asked for, of which a damaged config may want any amount
        _check_fit(made(kind, config), tensors, weights)
        model = kind(config)
        load_state(model, tensors, weights)
        tokenizer = get(TOKENIZER, optional=True)
        if tokenizer.is_file():
            try:
                model.tokenizer = load_tokenizer(tokenizer)
            except ValueError as error:
                raise CheckpointError(str(error)) from None
            if model.tokenizer.vocab_size > config.vocab_size:
                raise CheckpointError(
                    f"{tokenizer}: got {model.tokenizer.vocab_size} tokens, the model has {config.vocab_size}"
                )
        return model.to(device).eval()


def _local(folder: Path) -> Callable[..., Path]:
    places = (folder, folder / "best", folder / "last")
    folder = next((place for place in places if (place / CONFIG).is_file()), folder)

    def get(file: str, optional: bool = False) -> Path:
        return folder / file

    return get


def _remote(name: str, hub: dict[str, Any]) -> Callable[..., Path]:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    owner, slash, _ = name.partition("/")
    if not slash or Path(owner).exists():  # a mistyped path: the hub would be asked again and again
        raise CheckpointError(f"{name}: no such folder (a name on the hub is OWNER/NAME)")
    unreachable = None
    where = {key: hub.get(key) for key in ("subfolder", "revision", "endpoint")}
    pinned = re.fullmatch("[0-9a-f]{40}", where["revision"] or "")  # needs no network if cached
    if not (hub.get("local_files_only") or "proxies" in hub or pinned):
        # try once: without a network, hf_hub_download retries for half a minute and logs each attempt
        timeout = hub.get("etag_timeout", constants.HF_HUB_ETAG_TIMEOUT)
        try:
            get_hf_file_metadata(hf_hub_url(name, CONFIG, **where), token=hub.get("token"), timeout=timeout)
        except Exception as error:  # from requests or httpx; any other error hf_hub_download will report
            if any("Connect" in kind.__name__ for kind in type(error).__mro__):
                unreachable, hub = error, {**hub, "local_files_only": True}

    def get(file: str, optional: bool = False) -> Path:
        try:
            return Path(hf_hub_download(name, file, **hub))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
            if optional:
                return Path(file + ".absent")
            why = str(unreachable or error)
            reason = why.splitlines()[0] if why else type(unreachable or error).__name__
            raise CheckpointError(
                f"{name}: no such folder here, and {file} could not be had from the hub ({reason})"
            ) from None

    return get

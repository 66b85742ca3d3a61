"""Repositories on the hub, and parts of a pipeline that diffusers saved (vae/, text_encoder/, ...),
on disk or from there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from scd.common.files import read_json
from scd.common.weights import places_in

CONFIG_FILE = "config.json"
"""Settings of a part, beside its weights."""

AT_ROOT = "diffusion_pytorch_model*.safetensors*"
"""Weights, and their index, of a repository that is one model."""

AT_ROOT_OLD = "diffusion_pytorch_model*.bin*"
"""The same in the format of torch.save, for repositories that have no other."""

ABOUT = ("model_index.json", "scheduler/*")
"""What a repository says of the pipeline as a whole; small files."""

DIFFUSERS = "-Diffusers"
"""End of the names of Wan's repositories in the layout of diffusers."""

ORIGINAL_FILES = ("Wan2.*_VAE.pth", "models_t5_umt5*.pth", "*_noise_model")
"""Files and folders by which the layout of Wan's own release is known."""

CONTACT_S = 10
"""Seconds to wait for the hub's first answer."""

OFFLINE = (
    "where the hub cannot be reached, download the folder elsewhere (hf download {source}), copy "
    "it here and name the copy"
)
"""What to do without a network."""

WHOLE_BYTES, NUM_PIECES, PIECE_BYTES = 2**26, 256, 2**14
"""Of a fingerprint: the size up to which a file is read whole; and what is read of larger ones."""


def find_part(
    source: str | os.PathLike[str],
    part: str,
    classes: tuple[str, ...] = (),
    what: str = "model",
    at_root: bool = False,
) -> Path:
    """Return the folder of one part of a pipeline; from the hub it is downloaded, or found again.

    Args:
        source: folder that holds the part, or is the part; or the name of a repository on the hub.
        part: name of the part's folder, as in model_index.json.
        classes: names of classes that will do, of which config.json must name one. Empty: any, and
            config.json may be absent.
        what: what the part is, for errors.
        at_root: a repository on the hub may be the part itself, as a folder may.

    Raises:
        FileNotFoundError: neither the source nor the part is there, the hub cannot be reached, or
            some of the part's files are missing.
        ValueError: the part is another kind of model, or its settings cannot be read.
    """
    folder = Path(source)
    if folder.is_dir():
        # Without classes nothing would tell a part of another kind.
        is_part = folder.name == part or (bool(classes) and (folder / CONFIG_FILE).is_file())
        found = folder if is_part and not (folder / part).is_dir() else folder / part
        if not found.is_dir():
            raise FileNotFoundError(
                f"{folder} has no {part}/: needed a folder as diffusers writes it, or its {part}/"
                + _original_layout(folder)
            )
    else:
        found = _download(str(source), part, [CONFIG_FILE] if at_root else [])
        if at_root and found.name != part:
            _check_class(found, classes, what)
            found = _download(str(source), part, [CONFIG_FILE, AT_ROOT])
            if not next(found.glob(AT_ROOT), None):
                found = _download(str(source), part, [CONFIG_FILE, AT_ROOT_OLD])
    if classes:
        _check_class(found, classes, what)
    for index in (*found.glob("*.index.json"), *found.glob("*.index.*.json")):
        places_in(index)
    return found


def class_of(folder: Path) -> str:
    """Return the name of the class whose settings a part's config.json holds.

    Raises:
        ValueError: it cannot be read, or names none.
    """
    config = read_part_config(folder)
    names = config.get("architectures") or [None]
    name = config.get("_class_name") or names[0]
    if not isinstance(name, str):
        raise ValueError(f"{folder / CONFIG_FILE} names no class of model")
    return name


def read_part_config(folder: Path) -> dict[str, Any]:
    """Read the settings of a part.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are not readable.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: it is no part that was saved")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings")
    return config


def is_hub_name(name: str) -> bool:
    """Tell whether a name has the form of one on the hub: owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and name[-1:] != "/"


def download(
    source: str, patterns: Sequence[str], revision: str | None = None, **options: Any
) -> Path:
    """Return the local copy of a repository on the hub, downloaded now or found again.

    Args:
        source: owner/name.
        patterns: of the names of its files that are needed.
        revision: branch, tag or commit; None: the newest.
        options: others of the hub's `snapshot_download`.

    Raises:
        FileNotFoundError: no such name, or the hub cannot be reached and has not been before.
    """
    if not is_hub_name(source):
        raise FileNotFoundError(
            f"there is no folder {source}, and it is no name on the hub (owner/name) either"
        )
    try:
        # Asked first, because the library's own first question waits for ever where a network
        # swallows what is sent.
        refusal = None
        if not options.get("local_files_only"):
            hub = HfApi(token=options.get("token"))
            kind = options.get("repo_type")
            hub.repo_info(source, repo_type=kind, revision=revision, timeout=CONTACT_S)
    except HFValidationError as error:
        raise FileNotFoundError(f"there is no folder {source}: {error}") from error
    except Exception as error:
        # Where there is no network the error is one of the library beneath, whatever that is.
        refusal = error
    if refusal is not None:
        options["local_files_only"] = True
    try:
        return Path(
            snapshot_download(
                source,
                allow_patterns=list(patterns),
                etag_timeout=CONTACT_S,
                revision=revision,
                **options,
            )
        )
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {source}, {_reason(refusal or error, source)}"
        ) from error


def _reason(error: Exception, source: str) -> str:
    """Say why the hub did not give something, and what helps."""
    if isinstance(error, RevisionNotFoundError):
        return f"and the hub has no such revision of {source}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"and the hub shows no {source} to this account: another name, or hf auth login if it "
            "is private"
        )
    return f"and the hub did not give it ({_in_a_line(error)}); {OFFLINE.format(source=source)}"


def _in_a_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def upload(folder: Path, name: str, private: bool, token: str | None, message: str) -> str:
    """Put a folder's files into a repository on the hub, made anew if need be; return its address.

    Args:
        folder: what it holds goes to the root of the repository.
        name: owner/name, or a name under the owner of the token.
        private: whether a new repository is hidden from others.
        token: of an account that may write; None: the one of `hf auth login`.
        message: of the commit.

    Raises:
        ValueError: no name that the hub could have.
        OSError: the hub cannot be reached or refused; the folder is as it was.
    """
    hub = HfApi(token=token)
    try:
        with suppress(HfHubHTTPError):
            # Whatever it answers: it can be reached. Later questions have no time limit.
            hub.model_info(name, timeout=CONTACT_S)
        made = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name on the hub (owner/name): {error}") from error
    except Exception as error:
        raise OSError(
            f"the hub did not take {name} ({_in_a_line(error)}): it needs a network, and an "
            "account that may write there (hf auth login)"
        ) from error
    return str(made)


def _download(source: str, part: str, at_root: list[str]) -> Path:
    """Return the folder of a part, or of the whole where there is no part but files at its root."""
    copy = download(source, [f"{part}/*", *at_root, *ABOUT])
    found = copy / part
    if not found.is_dir() and at_root and (copy / CONFIG_FILE).is_file():
        return copy
    if not found.is_dir():
        is_original = "wan" in source.lower() and not source.endswith(DIFFUSERS)
        wanted = f"; you want {source}{DIFFUSERS}, if it is there" if is_original else ""
        raise FileNotFoundError(f"{source} on the hub has no {part}/{wanted}")
    return found


def _check_class(folder: Path, classes: tuple[str, ...], what: str) -> None:
    name = class_of(folder)
    if name not in classes:
        raise ValueError(
            f"{folder}: needed a {what} ({' or '.join(classes)}), it holds {name}"
            + _original_layout(folder)
        )


def _original_layout(folder: Path) -> str:
    """Return the end of a message for a folder in the layout of Wan's own release; else nothing."""
    if not any(next(folder.glob(pattern), None) for pattern in ORIGINAL_FILES):
        return ""
    return (
        "; this is Wan in the layout of its own release: you want the repository whose name ends "
        f"in {DIFFUSERS}, such as Wan-AI/Wan2.1-T2V-1.3B{DIFFUSERS}"
    )


def fingerprint(*folders: Path) -> str:
    """Name the contents of some folders, wherever they lie: 32 hexadecimal digits.

    Of files above 64 MiB the size and 256 pieces spread over the file count, not every byte.

    Raises:
        FileNotFoundError: a folder holds no files.
    """
    digest = hashlib.blake2b(digest_size=16)
    for folder in folders:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if not files:
            raise FileNotFoundError(f"{folder} holds no files")
        for path in files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                for piece in _pieces(file, path.stat().st_size):
                    digest.update(piece)
    return digest.hexdigest()


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    if size <= WHOLE_BYTES:
        yield file.read()
        return
    for number in range(NUM_PIECES):
        file.seek(number * (size - PIECE_BYTES) // (NUM_PIECES - 1))
        yield file.read(PIECE_BYTES)

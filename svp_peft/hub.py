"""`push_to_hub`: an adapter as one commit of exactly three files, with a model card.

    adapter_config.json, adapter_model.safetensors    as save_adapter writes them
    README.md                                         the model card

Pulling is part of `load_adapter`; which commit is taken, and what happens offline, is said in
download.py.
"""

import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from svp_peft.adapter_build import check_contents
from svp_peft.adapter_config import CONFIG_NAME, AdapterInfo, parse_config
from svp_peft.adapter_file import encode_adapter
from svp_peft.adapter_format import WEIGHTS_NAME, encode
from svp_peft.adapter_store import HubOptions, read_adapter
from svp_peft.download import call_hub, is_repo_id, library_version
from svp_peft.errors import AdapterNotFoundError, InputError
from svp_peft.sharded import has_shards

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
TAGS = ("svp", "adapter", "vision-mamba", "mamba-ssm")

Results = Mapping[str, float | Mapping[str, float]]
"""Measured results for the model card: {metric: value}, or {data set: {metric: value}}."""


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    adapter_name: str = "default",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    results: Results | None = None,
    license: str | None = None,
) -> "CommitInfo":
    """Upload one adapter of `model` to a model repository of the Hugging Face Hub.

    The repository is made if it does not exist. All three files are in one commit. A README.md
    that is there keeps its text and its own metadata; ours is added to the metadata.

    Args:
        model: a patched model, wrapped or not.
        repo_id: "owner/name", or "name" for the token's owner.
        adapter_name: which adapter.
        private: visibility of a new repository; None takes the owner's default.
        token: Hub token with the right to write; None takes the one of `hf auth login`.
        revision: branch to commit to; it must exist. Default: main.
        create_pr: open a pull request instead of committing to the branch.
        commit_message: default: 'Upload SVP adapter'.
        results: {metric: value} or {data set: {metric: value}}, for the model card. Only results
            with a data set can go into the metadata that the Hub's evaluation widget reads.
        license: for the model card, for example "apache-2.0". It is never guessed.

    Returns:
        The commit; `.oid` is its hash, `.pr_url` the pull request.

    Raises:
        HubError: no right to write, no such branch, the Hub failed or cannot be reached.
        NotAppliedError, AdapterNameError, AdapterWeightsError: as `save_adapter`.
        InputError: `repo_id` or `results` cannot be used, or README.md of the repository cannot
            be read.
    """
    if has_shards(model):
        raise InputError(
            "push_to_hub was called on a model that fully_shard has spread over several processes, "
            "and would have to send it from one. Call save_adapter in all of them, then "
            "`svp-peft push` with the folder."
        )
    config, weights = encode_adapter(model, adapter_name)
    return _push(
        config,
        weights,
        repo_id,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        results=results,
        license=license,
    )


def push_folder(folder: str | os.PathLike[str], repo_id: str, **options: Any) -> "CommitInfo":
    """Upload the adapter that `save_adapter` wrote to `folder`; checks it first.

    Args:
        folder: a local folder.
        repo_id, options: as in `push_to_hub`.

    Raises:
        As `push_to_hub`, and as `load_adapter` for the files.
    """
    if not Path(folder).is_dir():
        raise AdapterNotFoundError(f"there is no folder {folder}. Pass what save_adapter wrote.")
    contents = read_adapter(folder, HubOptions())
    check_contents(contents)
    return _push(*encode(contents.info, contents.tensors), repo_id, **options)


def model_card(
    repo_id: str,
    info: AdapterInfo,
    *,
    existing: str | None = None,
    results: Results | None = None,
    license: str | None = None,
) -> str:
    """Text of README.md for an adapter.

    Args:
        repo_id: "owner/name", for the load snippet.
        info: what the adapter is.
        existing: README.md of the repository; its text is kept, and what its metadata say.
        results, license: as in `push_to_hub`.
    """
    from huggingface_hub import ModelCard

    rows = _rows(results or {})
    text = existing or "\n" + _body(repo_id, info, rows)
    if not text.startswith("---"):
        text = f"---\n{{}}\n---\n{text}"
    try:
        card = ModelCard(text)
    except Exception as error:  # YAML's and the Hub's own, neither of which is a dependency
        raise InputError(
            f"the metadata at the top of README.md in {repo_id} cannot be read: {error}. Correct "
            "them on the Hub, or delete the file."
        ) from error
    data = card.data
    base = info.svp.base_model_name_or_path
    if base is not None and is_repo_id(base):
        data["base_model"] = base
        data["base_model_relation"] = "adapter"
    data["library_name"] = "svp_peft"
    data["pipeline_tag"] = data.get("pipeline_tag") or "image-classification"
    tags = data.get("tags") or ()
    data["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *TAGS]))
    if license is not None:
        data["license"] = license
    evaluated = [row for row in rows if row[0]]
    if evaluated:
        data["model_name"] = repo_id.rpartition("/")[2]
        data["eval_results"] = _eval_results(evaluated)
    return str(card)


def _push(
    config: bytes,
    weights: bytes,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    results: Results | None = None,
    license: str | None = None,
) -> "CommitInfo":
    from huggingface_hub import CommitOperationAdd, HfApi

    if not is_repo_id(repo_id):
        raise InputError(
            f"{repo_id!r} is not the id of a Hub repository. Pass 'owner/name': letters, digits, "
            "'-', '_' and '.', at most 96 of them."
        )
    _rows(results or {})  # refuses before anything is sent
    info = parse_config(config, CONFIG_NAME)
    if info.svp.base_model_name_or_path is None:
        logger.warning(
            "The adapter does not name its base model, so nobody who finds %s on the Hub knows "
            "what to load it into. Set SVPConfig(base_model_name_or_path='owner/name').",
            repo_id,
        )
    api = HfApi(token=token, library_name="svp_peft", library_version=library_version())
    wanted: dict[str, Any] = {} if private is None else {"private": private}
    # fills in the owner where only a name was given
    repo_id = call_hub(lambda: api.create_repo(repo_id, exist_ok=True, **wanted), repo_id).repo_id
    card = model_card(
        repo_id,
        info,
        existing=_existing_card(api, repo_id, revision, token),
        results=results,
        license=license,
    )
    files = {CARD_NAME: card.encode(), CONFIG_NAME: config, WEIGHTS_NAME: weights}
    return call_hub(
        lambda: api.create_commit(
            repo_id,
            operations=[CommitOperationAdd(path, data) for path, data in files.items()],
            commit_message=commit_message or "Upload SVP adapter",
            revision=revision,
            create_pr=create_pr,
        ),
        repo_id,
    )


def _existing_card(
    api: Any, repo_id: str, revision: str | None, token: str | bool | None
) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch() -> str | None:
        try:
            path = hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
        try:
            # not read_text, which would turn a user's \r\n into \n
            return Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"README.md in {repo_id} is not UTF-8 ({error}), so its text cannot be kept. Save "
                "it as UTF-8, or delete the file."
            ) from error

    return call_hub(fetch, repo_id)


def _body(repo_id: str, info: AdapterInfo, results: list[tuple[str, str, float]]) -> str:
    svp, arch = info.svp, info.base_arch
    base = svp.base_model_name_or_path
    classes = "" if info.num_classes is None else f", num_classes={info.num_classes}"
    lines = [
        f"# {repo_id.rpartition('/')[2]}",
        "",
        "An adapter for Vision Mamba, trained by Selective Visual Prompting "
        "([paper](https://arxiv.org/abs/2412.08947)) with "
        f"svp_peft {info.svp_peft_version}. The base model's weights are not in it.",
        "",
        "## Load it",
        "",
        "```bash",
        "pip install svp_peft",
        "```",
        "",
        "```python",
        "import svp_peft as sp",
        "",
        f'model = sp.load_vim("{base or "the/base-model"}"{classes})',
        f'sp.load_adapter(model, "{repo_id}")',
        "```",
        "",
        "## What it is",
        "",
        "| | |",
        "|---|---|",
    ]
    revision = f" (revision {svp.revision})" if svp.revision else ""
    rows = {
        "base model": f"{base}{revision}" if base else "not recorded",
        "blocks, token width": f"{arch['depth']}, {arch['d_model']}",
        "classes": info.num_classes if info.num_classes is not None else "no head",
        "inner_bottleneck": svp.inner_bottleneck,
        "cross_group_size": svp.cross_group_size,
        "cross_source": svp.cross_source,
        "simam_input": svp.simam_input,
        "use_cross, use_inner": f"{svp.use_cross}, {svp.use_inner}",
        "layers": "all" if svp.layers is None else list(svp.layers),
        "dropout": svp.dropout,
    }
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    if results:
        lines += ["", "## Results", "", "| data set | metric | value |", "|---|---|---|"]
        lines += [
            f"| {_cell(data)} | {_cell(metric)} | {value:g} |" for data, metric, value in results
        ]
    return "\n".join([*lines, ""])


def _rows(results: Results) -> list[tuple[str, str, float]]:
    """(data set or "", metric, value) of every result; `InputError` if one is no number."""
    rows: list[tuple[str, str, float]] = []
    try:
        for name, value in results.items():
            inner = value.items() if isinstance(value, Mapping) else ((None, value),)
            for metric, number in inner:
                names = (str(name), str(metric)) if metric is not None else ("", str(name))
                rows.append((*names, float(number)))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"results={results!r} cannot go into the model card ({error}). Pass numbers by metric, "
            "{'accuracy': 0.9}, or by data set and metric, {'CUB-200': {'accuracy': 0.9}}."
        ) from error
    odd = [row for row in rows if not math.isfinite(row[2])]
    if odd:
        raise InputError(
            f"results hold {odd[0][2]} for {odd[0][1]!r}: the Hub takes finite numbers only. Leave "
            "it out."
        )
    return rows


def _cell(text: str) -> str:
    """Text that stays within one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _eval_results(results: list[tuple[str, str, float]]) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-") or "data",
            dataset_name=data,
            metric_type=re.sub(r"[^a-z0-9]+", "_", metric.lower()).strip("_") or "value",
            metric_name=metric,
            metric_value=value,
        )
        for data, metric, value in results
    ]

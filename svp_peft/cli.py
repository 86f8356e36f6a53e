"""The command line: svp-peft inspect | convert | push | doctor.

Exit codes: 0 all is well; 1 the adapter, checkpoint or installation has a problem, which is
printed; 2 wrong usage; 3 the Hub cannot be reached, so trying again later may help.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from svp_peft.adapter_build import check_contents, has_effect
from svp_peft.adapter_file import head_outputs
from svp_peft.adapter_format import UNUSED_SCALE_ROWS, AdapterContents
from svp_peft.adapter_store import HubOptions, read_adapter
from svp_peft.convert import convert_svp_checkpoint
from svp_peft.doctor import diagnose
from svp_peft.download import library_version
from svp_peft.errors import HubUnreachable, SVPError
from svp_peft.hub import push_folder

OK, PROBLEM, USAGE, UNREACHABLE = range(4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader (`| head`) has what it wanted; nothing more can be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SVPError as error:
        code = UNREACHABLE if isinstance(error, HubUnreachable) else PROBLEM
        _fail(options, error)
    return code


def _fail(options: argparse.Namespace, error: SVPError) -> None:
    if options.json:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    else:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="svp-peft",
        description="Adapters for Vision Mamba by Selective Visual Prompting.",
        epilog="Exit codes: 0 well, 1 a problem was found, 2 wrong usage, 3 Hub not reachable.",
    )
    parser.add_argument("--version", action="version", version=f"svp_peft {library_version()}")
    commands = parser.add_subparsers(required=True, metavar="command")

    inspect = _command(commands, "inspect", _inspect, "show and examine an adapter")
    inspect.add_argument("adapter", help="folder, or Hub repository 'owner/name'")
    inspect.add_argument("--revision", help="branch, tag or commit on the Hub")
    inspect.add_argument("--subfolder", help="folder inside the repository or folder")
    inspect.add_argument("--token", help="Hub token; default: the one of `hf auth login`")

    convert = _command(commands, "convert", _convert, "make an adapter of the authors' checkpoint")
    convert.add_argument("checkpoint", help="checkpoint.pth of the released SVP code")
    convert.add_argument("out", help="folder for the adapter")
    convert.add_argument(
        "--simam-input",
        choices=("yes", "no"),
        help="whether it was trained with input_relu, where the file does not say",
    )
    convert.add_argument("--ema", action="store_true", help="take the moving average model_ema")
    convert.add_argument("--base", metavar="OWNER/NAME", help="Hub id of the base model")

    push = _command(commands, "push", _push, "upload an adapter folder to the Hub")
    push.add_argument("folder", help="what save_adapter wrote")
    push.add_argument("repo", help="Hub repository 'owner/name'; made if it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="make it private")
    push.add_argument("--token", help="Hub token; default: the one of `hf auth login`")
    push.add_argument("--revision", help="branch to commit to; default main")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.add_argument("--message", help="commit message")
    push.add_argument("--license", help="licence for the model card, for example apache-2.0")

    _command(commands, "doctor", _doctor, "examine this installation")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return command


def _inspect(options: argparse.Namespace) -> int:
    contents = read_adapter(
        options.adapter,
        HubOptions(revision=options.revision, subfolder=options.subfolder, token=options.token),
    )
    problems, notes = _health(contents)
    info = contents.info
    tensors = [
        {
            "key": key,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "max_abs": float(tensor.abs().max()) if bool(torch.isfinite(tensor).all()) else None,
        }
        for key, tensor in sorted(contents.tensors.items())
    ]
    head = {key: t for key, t in contents.tensors.items() if key.startswith("head.")}
    report = {
        "adapter": contents.where,
        "config": info.to_dict(),
        "parameters": sum(tensor.numel() for tensor in contents.tensors.values()),
        "head_parameters": sum(tensor.numel() for tensor in head.values()),
        "bytes": sum(t.numel() * t.element_size() for t in contents.tensors.values()),
        "tensors": tensors,
        "health": {"ok": not problems, "problems": problems, "notes": notes},
    }
    if options.json:
        print(json.dumps(report, allow_nan=False))
    else:
        _print_report(report)
    return PROBLEM if problems else OK


def _health(contents: AdapterContents) -> tuple[list[str], list[str]]:
    """(what makes the adapter unusable, what is worth knowing)."""
    problems = []
    try:
        check_contents(contents)
    except SVPError as error:
        problems.append(f"{type(error).__name__}: {error}")
    notes = []
    if not has_effect(contents.tensors):
        notes.append("every learned scale is zero: the prompts do nothing")
    if contents.from_weights_file:
        notes.append("adapter_config.json is of another save; the weights file's own config holds")
    if contents.config_differs:
        notes.append(f"edited after saving: {', '.join(contents.config_differs)}")
    if contents.info.weights_sha256 is None:
        notes.append("no hash is stored, so damage to the numbers cannot be seen")
    if contents.info.svp.base_model_name_or_path is None:
        notes.append("the base model is not named")
    # which of several named layers is the last one, the file does not tell
    outputs: list[int | None] = [*head_outputs(contents.tensors)] or [None]
    if contents.info.num_classes not in outputs:
        notes.append(
            f"num_classes is {contents.info.num_classes}, but the head has {outputs[-1]} outputs"
        )
    if UNUSED_SCALE_ROWS in contents.tensors:
        notes.append("converted from the released code, with its unused scale rows")
    return problems, notes


def _print_report(report: dict[str, Any]) -> None:
    config, health = report["config"], report["health"]
    size = f"{report['bytes'] / 1e6:.2f} MB"
    print(f"{report['adapter']}: {report['parameters']:,} numbers, {size}")
    print("\nconfig")
    for key in sorted(config):
        print(f"  {key:<25}{json.dumps(config[key])}")
    print("\ntensors")
    for row in report["tensors"]:
        # a key may hold anything, codes that a terminal obeys too
        key = json.dumps(row["key"])[1:-1]
        shape = "x".join(str(size) for size in row["shape"])
        largest = "not finite" if row["max_abs"] is None else f"largest {row['max_abs']:.3g}"
        print(f"  {key:<34}{shape:<12}{row['dtype']:<10}{largest}")
    print(f"\nhealth: {'good' if health['ok'] else 'BAD'}")
    for line in [*health["problems"], *health["notes"]]:
        print(f"  {line}")


def _convert(options: argparse.Namespace) -> int:
    simam = {"yes": True, "no": False, None: None}[options.simam_input]
    folder = convert_svp_checkpoint(
        options.checkpoint,
        options.out,
        simam_input=simam,
        use_ema=options.ema,
        base_model_name_or_path=options.base,
    )
    if options.json:
        print(json.dumps({"adapter": str(folder)}))
    else:
        print(f"wrote the adapter to {folder}; look at it with `svp-peft inspect {folder}`")
    return OK


def _push(options: argparse.Namespace) -> int:
    commit = push_folder(
        options.folder,
        options.repo,
        private=options.private,
        token=options.token,
        revision=options.revision,
        create_pr=options.create_pr,
        commit_message=options.message,
        license=options.license,
    )
    report = {"commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url}
    if options.json:
        print(json.dumps(report))
    else:
        print(commit.pr_url or commit.commit_url)
    return OK


def _doctor(options: argparse.Namespace) -> int:
    findings = diagnose()
    problems = [finding for finding in findings if finding.status == "problem"]
    if options.json:
        report = {"ok": not problems, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report))
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "absent": "-   ", "problem": "BAD "}[finding.status]
            print(f"{mark}{finding.name:<20}{finding.detail}")
            if finding.remedy:
                print(f"    {'':<20}-> {finding.remedy}")
        print(f"\n{len(problems)} problem{'' if len(problems) == 1 else 's'} found")
    return PROBLEM if problems else OK

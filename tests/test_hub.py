"""Push and pull with the real Hub client against a real HTTP server on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator

import pytest

from svp_peft.adapter_build import check_contents
from svp_peft.adapter_config import CONFIG_NAME
from svp_peft.adapter_file import encode_adapter, load_adapter, save_adapter
from svp_peft.adapter_format import WEIGHTS_NAME, decode
from svp_peft.config import SVPConfig
from svp_peft.download import is_repo_id
from svp_peft.hub import push_to_hub
from svp_peft.ops import set_backend
from tests.fakehub import TOKEN, FakeHub
from tests.processes import Answer, Processes
from tests.tiny import CONFIG, base, images, trained

NAMED = SVPConfig(
    inner_bottleneck=4, cross_group_size=2, base_model_name_or_path="hustvl/Vim-small-midclstok"
)


# run in other processes


def push(
    repo_id: str, *, seed: int = 1, named: bool = True, **options: object
) -> dict[str, object]:
    commit = push_to_hub(trained(NAMED if named else CONFIG, seed=seed), repo_id, **options)
    return {"oid": commit.oid, "pr": commit.pr_url}


def load(repo_id: str, **options: object) -> list[list[float]]:
    model = base()
    try:
        load_adapter(model, repo_id, **options)
    except BaseException:
        assert "svp" not in model._modules
        raise
    return model(images()).tolist()


def load_twice(repo_id: str) -> str:
    load(repo_id)
    load(repo_id)
    return "done"


@pytest.fixture(scope="module", autouse=True)
def _same_backend() -> Iterator[None]:
    """The one the other processes compute with, so that logits can be compared bit for bit."""
    set_backend("reference")
    yield
    set_backend("auto")


@pytest.fixture(scope="module")
def running_hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def quick(running_hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    env = running_hub.env(tmp_path_factory.mktemp("cache"))
    with Processes(env, preload=("huggingface_hub.hf_api", "huggingface_hub.repocard")) as running:
        yield running


@pytest.fixture(scope="module")
def fresh() -> Iterator[Processes]:
    """Processes that import the Hub client themselves, for other settings than the usual."""
    with Processes() as running:
        yield running


@pytest.fixture
def hub(running_hub: FakeHub) -> FakeHub:
    running_hub.faults.clear()
    running_hub.requests.clear()
    return running_hub


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository of each test's own, because all share one cache."""
    return "me/" + hashlib.sha256(request.node.name.encode()).hexdigest()[:12]


@pytest.fixture
def client(quick: Processes) -> Callable[..., Answer]:
    return quick.call


def adapter_files(seed: int = 1) -> dict[str, bytes]:
    config, weights = encode_adapter(trained(seed=seed), "default")
    return {CONFIG_NAME: config, WEIGHTS_NAME: weights}


def logits(seed: int = 1) -> list[list[float]]:
    return trained(seed=seed)(images()).tolist()


def value(answer: Answer) -> object:
    assert not answer.error, answer.traceback
    return answer.value


def refused(answer: Answer, kind: str, *parts: str) -> None:
    assert answer.error == kind, answer.traceback or answer.value
    for part in parts:
        assert part in answer.message, answer.message


# push


def client_file() -> str:
    import huggingface_hub

    return huggingface_hub.__file__


def test_client_is_the_release_that_was_asked_for(client):
    """`SVP_PEFT_TEST_HUB_PATH` runs this file with another release; see docs/contributing.md."""
    wanted = os.environ.get("SVP_PEFT_TEST_HUB_PATH", "site-packages")
    assert wanted in value(client(client_file))


def test_push_is_one_commit_of_exactly_three_files(hub, client, repo):
    commit = value(client(push, repo, license="mit", results={"CUB": {"accuracy": 0.9}}))
    assert hub.repos[repo].refs["main"] == commit["oid"]
    assert hub.count(r"POST .*/commit/") == 1
    assert set(hub.files(repo)) == {".gitattributes", "README.md", CONFIG_NAME, WEIGHTS_NAME}
    check_contents(
        decode(
            hub.files(repo)[CONFIG_NAME],
            hub.files(repo)[WEIGHTS_NAME],
            where="pushed",
            one_commit=True,
        )
    )
    agent = next(r for r in hub.requests if "/commit/" in r.path).headers
    assert "svp_peft/" in {key.lower(): text for key, text in agent.items()}["user-agent"]


def test_pushed_adapter_is_loaded_equal(hub, client, repo):
    value(client(push, repo))
    assert value(client(load, repo)) == logits()


def test_card_says_what_the_hub_and_a_reader_need(hub, client, repo):
    value(client(push, repo, license="mit", results={"CUB": {"accuracy": 0.9}, "ECE": 0.1}))
    card = hub.files(repo)["README.md"].decode()
    for line in [
        "library_name: svp_peft",
        "base_model: hustvl/Vim-small-midclstok",
        "base_model_relation: adapter",
        "pipeline_tag: image-classification",
        "license: mit",
        "- vision-mamba",
        "name: CUB",
        "| CUB | accuracy | 0.9 |",
        "|  | ECE | 0.1 |",
        "| inner_bottleneck | 4 |",
        f'sp.load_adapter(model, "{repo}")',
    ]:
        assert line in card, line


def test_text_and_metadata_of_a_users_card_are_kept(hub, client, repo):
    mine = "---\nlicense: cc-by-4.0\ntags: [birds]\npipeline_tag: image-feature-extraction\n---\n\n"
    hub.add(repo, {"README.md": (mine + "# My birds\n\nHand-written.\n").encode()})
    value(client(push, repo))
    card = hub.files(repo)["README.md"].decode()
    assert card.endswith("# My birds\n\nHand-written.\n")
    for line in [
        "license: cc-by-4.0",
        "- birds",
        "- svp",
        "image-feature-extraction",
        "base_model:",
    ]:
        assert line in card


def test_card_of_another_editor_keeps_its_line_ends(hub, client, repo):
    mine = "\ufeff---\r\nlicense: cc-by-4.0\r\n---\r\n# My birds\r\n\r\nHand-written.\r\n"
    hub.add(repo, {"README.md": mine.encode()})
    value(client(push, repo))
    card = hub.files(repo)["README.md"].decode()
    assert card.startswith("---")
    assert card.endswith("---\r\n# My birds\r\n\r\nHand-written.\r\n")
    assert card.count("license: cc-by-4.0") == 1


def test_card_that_is_not_utf_8_is_not_replaced(hub, client, repo):
    hub.add(repo, {"README.md": "Über Vögel".encode("utf-16")})
    refused(client(push, repo), "InputError", "README.md", "not UTF-8", "Save it as UTF-8")
    assert set(hub.files(repo)) == {"README.md"}


@pytest.mark.parametrize(
    "results",
    [{"accuracy": "high"}, {"CUB": {"accuracy": None}}, [0.9], {"accuracy": float("nan")}],
)
def test_results_that_are_no_numbers_are_refused_before_anything_is_sent(
    hub, client, repo, results
):
    refused(client(push, repo, results=results), "InputError", "results")
    assert hub.requests == []


def test_names_of_results_cannot_break_the_table_of_the_card(hub, client, repo):
    value(client(push, repo, results={"a\nb": {"top|1": 0.5}}))
    assert "| a b | top\\|1 | 0.5 |" in hub.files(repo)["README.md"].decode()


def test_card_with_broken_metadata_is_not_replaced(hub, client, repo):
    hub.add(repo, {"README.md": b"---\ntags: [unclosed\n---\nMine.\n"})
    refused(client(push, repo), "InputError", "README.md", "Correct them")
    assert set(hub.files(repo)) == {"README.md"}


def test_push_without_a_base_model_warns_and_leaves_it_out_of_the_card(hub, client, repo):
    answer = client(push, repo, named=False)
    assert "does not name its base model" in answer.log
    assert "base_model" not in hub.files(repo)["README.md"].decode().split("\n# ")[0]


def test_pushing_the_same_again_makes_no_commit(hub, client, repo):
    first = value(client(push, repo))
    value(client(push, repo))
    assert hub.repos[repo].refs["main"] == first["oid"]


def test_pull_request_and_branch(hub, client, repo):
    value(client(push, repo))
    main = hub.repos[repo].refs["main"]
    answer = value(client(push, repo, seed=2, create_pr=True))
    assert answer["pr"].endswith("/discussions/1")
    assert hub.repos[repo].refs["main"] == main
    assert value(client(load, repo, revision="refs/pr/1")) == logits(2)
    refused(client(push, repo, seed=3, revision="v2"), "HubError", "no such revision")
    hub.repos[repo].refs["v2"] = main
    value(client(push, repo, seed=3, revision="v2"))
    assert value(client(load, repo, revision="v2")) == logits(3)
    assert value(client(load, repo)) == logits()


def test_new_repository_is_private_if_asked_and_named_by_its_owner(hub, client):
    value(client(push, "cars", private=True))
    assert hub.repos["tester/cars"].private


def test_push_that_is_not_allowed_says_how_to_sign_in(hub, client, repo):
    for token in (False, "hf_wrong"):
        refused(client(push, repo, token=token), "HubError", "hf auth login")
    assert repo not in hub.repos


def test_push_to_a_hub_that_fails_says_so(hub, client, repo):
    hub.fault("POST .*/commit/", "status", status=503)
    refused(client(push, repo), "HubUnreachable", "HTTP 503", "Try again later")


@pytest.mark.parametrize("repo_id", ["a/b/c", "../x", "a b", "", "x" * 97, "a--b"])
def test_repository_ids_are_checked_before_anything_is_sent(hub, client, repo_id):
    assert not is_repo_id(repo_id)
    refused(client(push, repo_id), "InputError", "owner/name")
    assert not hub.requests


# pull


def test_load_takes_two_files_of_one_commit_with_few_requests(hub, client, repo):
    hub.add(repo, adapter_files())
    assert value(client(load, repo)) == logits()
    # one to resolve the revision, then each file once
    assert hub.count(f"/api/models/{repo}") == 1
    assert hub.count(rf"GET .*/resolve/[0-9a-f]{{40}}/{CONFIG_NAME}") == 1
    assert hub.count(r"/resolve/main/") == 0
    assert len(hub.requests) <= 6


def test_token_is_not_sent_to_the_host_that_holds_the_large_files(hub, client, repo):
    hub.add(repo, adapter_files(), private=True)
    value(client(load, repo))
    cdn = [r for r in hub.requests if r.host == "cdn"]
    assert cdn
    for request in cdn:
        assert TOKEN not in json.dumps(request.headers)
    assert any(TOKEN in json.dumps(r.headers) for r in hub.requests if r.host == "hub")


@pytest.mark.parametrize("moment", [f"HEAD .*{CONFIG_NAME}", f"HEAD .*{WEIGHTS_NAME}"])
def test_main_that_moves_while_loading_does_not_mix_two_commits(hub, client, repo, moment):
    hub.add(repo, adapter_files(1))
    hub.before(moment, lambda: hub.add(repo, adapter_files(2)))
    assert value(client(load, repo)) == logits(1)
    assert value(client(load, repo)) == logits(2)


def test_commit_in_the_cache_needs_no_request(hub, client, repo):
    commit = hub.add(repo, adapter_files())
    value(client(load, repo, revision=commit))
    before = len(hub.requests)
    assert value(client(load, repo, revision=commit)) == logits()
    assert len(hub.requests) == before


def test_local_files_only_uses_the_cache_and_asks_nobody(hub, client, repo):
    hub.add(repo, adapter_files())
    answer = client(load, repo, local_files_only=True)
    refused(answer, "HubError", "not in the Hub cache", "cache_dir")
    value(client(load, repo))
    before = len(hub.requests)
    assert value(client(load, repo, local_files_only=True)) == logits()
    assert len(hub.requests) == before
    answer = client(load, repo, force_download=True, local_files_only=True)
    refused(answer, "HubError", "Drop one of the two")


def test_offline_and_hub_down_use_the_cache_and_say_so(fresh, tmp_path):
    with FakeHub() as hub:
        env = hub.env(tmp_path)
        hub.add("me/birds", adapter_files())
        value(fresh.call(load, "me/birds", env=env))
        before = len(hub.requests)
        offline = env | {"HF_HUB_OFFLINE": "1"}
        assert value(fresh.call(load, "me/birds", env=offline)) == logits()
        assert len(hub.requests) == before
    answers = {
        "cached": (load, ("me/birds",), {}),
        "forced": (load, ("me/birds",), {"force_download": True}),
        "unknown": (load, ("me/cars",), {}),
        "push": (push, ("me/birds",), {}),
    }
    found = dict(zip(answers, fresh.call_all(list(answers.values()), env=env), strict=True))
    assert value(found["cached"]) == logits()
    assert "cannot be reached" in found["cached"].log
    assert "Using the cached commit" in found["cached"].log
    for name in ("forced", "unknown", "push"):
        refused(found[name], "HubUnreachable", "cannot be reached", "Check the connection")


def test_cached_copy_does_not_hide_that_access_was_withdrawn(hub, client, repo):
    hub.add(repo, adapter_files())
    value(client(load, repo))
    hub.repos[repo].private = True
    for token in (False, "hf_wrong"):
        refused(client(load, repo, token=token), "HubError", "private", "hf auth login")
    assert value(client(load, repo)) == logits()


def test_each_reason_for_a_refusal_has_its_own_message(hub, client, repo):
    refused(client(load, "me/nothing"), "HubError", "does not exist", "no local folder me/nothing")
    hub.add("me/private", adapter_files(), private=True)
    refused(client(load, "me/private", token=False), "HubError", "private", "token=")
    hub.add("me/gated", adapter_files(), gated=True)
    refused(client(load, "me/gated", token=False), "HubError", "gated", "Ask for access")
    hub.add(repo, adapter_files())
    refused(client(load, repo, revision="v9"), "HubError", "no such revision", "/commits")
    refused(client(load, repo, subfolder="x"), "AdapterNotFoundError", f"{repo}@", "x has no")


def test_repository_without_an_adapter_is_described(hub, client):
    hub.add("me/model", {"config.json": b"{}", "model.safetensors": b"x"})
    refused(client(load, "me/model"), "AdapterNotFoundError", "whole model", "load_vim")
    hub.add("me/pickle", {CONFIG_NAME: adapter_files()[CONFIG_NAME], "adapter_model.bin": b"x"})
    refused(client(load, "me/pickle"), "AdapterNotFoundError", "pickle", "convert_svp_checkpoint")
    files = {f"birds/{name}": data for name, data in adapter_files().items()}
    hub.add("me/many", files)
    refused(client(load, "me/many"), "AdapterNotFoundError", "'birds'", "subfolder=")
    assert value(client(load, "me/many", subfolder="birds")) == logits()
    assert value(client(load, "me/many", subfolder="birds", local_files_only=True)) == logits()


def test_local_folder_wins_over_a_repository_of_the_same_name(hub, client, repo, tmp_path):
    save_adapter(trained(seed=3), tmp_path / repo)
    hub.add(repo, adapter_files(1))
    assert value(client(load_in_folder, str(tmp_path), repo)) == logits(3)
    assert not hub.requests


def load_in_folder(folder: str, repo_id: str) -> object:
    import os

    os.chdir(folder)
    return load(repo_id)


# a Hub that misbehaves


def test_slow_hub_is_waited_for_and_a_silent_one_is_not(hub, client, repo):
    hub.add(repo, adapter_files())
    hub.fault(f"GET .*{CONFIG_NAME}", "slow", seconds=1.0, times=1)
    assert value(client(load, repo)) == logits()
    hub.fault("GET /api/models", "slow", seconds=4)
    answer = client(load, repo, force_download=True)
    refused(answer, "HubUnreachable", "cannot be reached", "timed out")


BROKEN = {
    "half": {"kind": "half"},
    "longer": {"kind": "longer"},
    "shorter": {"kind": "shorter"},
    "error": {"kind": "status", "status": 500},
}


@pytest.mark.parametrize(
    ("file", "fault"),
    [*((WEIGHTS_NAME, fault) for fault in BROKEN), (CONFIG_NAME, "shorter"), (CONFIG_NAME, "half")],
)
def test_broken_transfer_loads_nothing_and_a_later_try_works(hub, client, repo, fault, file):
    files = adapter_files()
    hub.add(repo, files)
    # the large file comes from the second host, by its hash
    where = file if file == CONFIG_NAME else hashlib.sha256(files[file]).hexdigest()
    hub.fault(f"GET .*{where}", **BROKEN[fault])
    answer = client(load, repo)
    if answer.error:
        assert answer.error in ("HubError", "HubUnreachable", "AdapterConfigError",
                                "AdapterWeightsError"), answer.traceback  # fmt: skip
    else:
        assert answer.value == logits()
    hub.faults.clear()
    again = client(load, repo)
    if again.error:
        # the client itself kept a file of wrong content: the message says how to get rid of it
        assert "force_download=True" in again.message or "etch" in again.message, again.message
        again = client(load, repo, force_download=True)
    assert value(again) == logits()


def test_other_files_content_under_the_right_name_is_noticed(hub, client, repo):
    """A proxy or CDN that serves another adapter's bytes, of the same length, with a 200."""
    mine, other = adapter_files(1), adapter_files(2)
    assert len(mine[WEIGHTS_NAME]) == len(other[WEIGHTS_NAME])
    hub.add(repo, mine)
    hub.add("me/other", other)
    hub.fault(
        f"GET /{hashlib.sha256(mine[WEIGHTS_NAME]).hexdigest()}",
        "content",
        content=other[WEIGHTS_NAME],
    )
    refused(
        client(load, repo),
        "AdapterWeightsError",
        "belongs to other weights",
        "force_download=True",
    )
    hub.faults.clear()
    assert value(client(load, repo, force_download=True)) == logits(1)


def test_zeros_instead_of_the_weights_are_noticed(hub, client, repo):
    mine = adapter_files()
    hub.add(repo, mine)
    hub.fault(f"GET /{hashlib.sha256(mine[WEIGHTS_NAME]).hexdigest()}", "content")
    refused(client(load, repo), "AdapterWeightsError", "Fetch or save the file again")

"""The licence of a run's target: read where its makers wrote it, or said to be unknown."""

import tomllib

import pytest
from hub_server import TOKEN, Hub
from hub_state import Repo
from huggingface_hub import constants, hf_hub_download
from paths import ROOT

from peagle.card import target_license
from peagle.target.target import TargetSource

TARGET = "team/target"


def license_of(target: TargetSource) -> str | None:
    return target_license.license_of(target.name, target.path, target.revision)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with a public target, whose README changed its licence in the second commit."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        repo = hub.repos[TARGET] = Repo(private=False)
        for license in ("apache-2.0", "gemma"):
            readme = hub.storage.store(f"---\nlicense: {license}\n---\n# Target\n".encode())
            hub.add_commit(repo, "main", license, "", {"README.md": readme})
        yield hub


def test_the_embedded_target_has_the_licence_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert license_of(TargetSource("tiny")) == project["license"].lower()


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Target\n", "mit"),
        ("---\nlicense: other\nlicense_name: our-own\n---\n", "our-own"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, gemma]\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("# Target\n\nlicense: mit\n", None),
        (None, None),
    ],
)
def test_a_folder_has_the_licence_that_its_readmes_front_matter_names(
    tmp_path, capsys, readme, expected
):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert license_of(TargetSource(str(tmp_path))) == expected
    assert capsys.readouterr().err == ""


def test_a_target_on_the_hub_has_the_licence_of_its_own_revision(hub):
    first = hub.repos[TARGET].history("main")[-1].oid
    assert license_of(TargetSource(TARGET)) == "gemma"
    assert license_of(TargetSource(TARGET, first)) == "apache-2.0"


def test_a_target_that_was_fetched_before_needs_no_hub(hub):
    readme = {"filename": "README.md", "endpoint": hub.url}
    hf_hub_download(TARGET, cache_dir=constants.HF_HUB_CACHE, **readme)
    hub.requests.clear()
    assert license_of(TargetSource(TARGET)) == "gemma" and hub.requests == []


def test_a_target_without_a_readme_has_no_known_licence(hub, capsys):
    hub.add_commit(hub.repos[TARGET], "main", "no README", "", {})
    assert license_of(TargetSource(TARGET)) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("trouble", ["broken front matter", "the Hub refuses", "offline"])
def test_a_licence_that_cannot_be_read_is_said_and_ends_nothing(
    hub, tmp_path, monkeypatch, capsys, trouble
):
    target = TargetSource(TARGET)
    if trouble == "broken front matter":
        (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
        target = TargetSource(str(tmp_path))
    elif trouble == "the Hub refuses":
        hub.fault("any", status=403)
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert license_of(target) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"licence of {target.name}: not known (")
    assert line.endswith("give RunRecord a `license`")

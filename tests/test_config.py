"""The command line and the config: typed by field, and every mistake one line that names field, value, rule and remedy."""

import dataclasses

import pytest

from qtjax.config import Config, fields, from_json, load_config, override, to_json, validate
from qtjax.errors import QtjaxError, door


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from qtjax.config import Config, TrainSection\n"
        "def get_config():\n    return Config(train=TrainSection(learning_rate=3e-4, rows=2))\n"
    )
    return str(path)


def load(file, *argv, extra=None):
    return load_config("prog", "what it does", ["--config", file, *argv], extra)


def test_overrides_are_typed_by_field(file):
    """The file's values hold, flags win, each becomes the field's type."""
    config, _ = load(file, "--train.learning-rate", "1e-4", "--run.export", "no", "--data.path", "x.jsonl")
    assert config.train.learning_rate == 1e-4 and config.train.rows == 2
    assert config.run.export is False and config.data.path == "x.jsonl"
    assert load(file)[0].train.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train.lerning-rate", "1"], "--train.lerning-rate: no such flag; did you mean '--train.learning-rate'"),
        (["--train.learning-rate", "fast"], "train.learning_rate = 'fast': must be a number"),
        (["--train.learning-rate", "-1"], "train.learning_rate = -1.0: must be above 0"),
        (["--train.rows", "2.5"], "train.rows = '2.5': must be an integer"),
        (["--prune.sample-keep", "1.5"], "prune.sample_keep = 1.5: is a fraction above 0 and at most 1"),
        (["--prune.mode", "drp"], "prune.mode = 'drp': must be one of mask, drop; did you mean 'drop'"),
        (["--run.export", "maybe"], "run.export = 'maybe': must be true or false"),
        (["--train.rows"], "expected one argument"),
        (["--train.learning-rate", "nan"], "train.learning_rate = nan: must be a finite number"),
        (["--train.row-length", "64", "--data.max-length", "128"], "train.row_length = 64: must be at least data.max_length"),
        (["--train.epochs", "inf"], "train.epochs = inf: must be a finite number"),
        (["--train.learning-rate", "-1e-4"], "train.learning_rate = -0.0001: must be above 0"),
        (["--prune.score-lag", "2"], "prune.score_lag = 2: must be 0 or 1"),
        (["--prune.score-lag", "-1"], "prune.score_lag = -1: must be 0 or 1"),
        (["stray"], "stray: no such flag"),
    ],
)
def test_mistakes_are_one_line(file, argv, said):
    """Unknown flags, wrong types and impossible values name what is wrong and what would be right."""
    with pytest.raises(QtjaxError) as error:
        load(file, *argv)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_config_files_that_are_none(tmp_path):
    """A missing file, a file without get_config and one that returns something else are named."""
    with pytest.raises(QtjaxError, match="no such file"):
        load(str(tmp_path / "absent.py"))
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(QtjaxError, match="must define get_config"):
        load(str(empty))
    empty.write_text("def get_config():\n    return {}\n")
    with pytest.raises(QtjaxError, match="returned dict"):
        load(str(empty))
    empty.write_text(
        "from qtjax.config import Config, TrainSection\ndef get_config():\n    return Config(train=TrainSection(learning_rat=1.0))\n"
    )
    with pytest.raises(QtjaxError, match="learning_rat.*did you mean 'learning_rate'"):
        load(str(empty))


def test_help_shows_every_field_with_its_default(file, capsys):
    """--help lists each field as a flag with doc and default."""
    with pytest.raises(SystemExit):
        load(file, "--help")
    said = " ".join(capsys.readouterr().out.split())
    for section in fields(Config):
        for f in fields(getattr(Config(), section.name)):
            assert f"--{section.name}.{f.name}".replace("_", "-") in said
            assert f.metadata["doc"].split()[0] in said
    assert "default: 0.0001" in said


def test_help_shows_what_the_file_sets(file, tmp_path, capsys):
    """With --config, --help shows the file's values beside the defaults; a file that cannot be read hides nothing else."""

    def said(*argv):
        with pytest.raises(SystemExit) as stop:
            load_config("prog", "what it does", list(argv))
        assert stop.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    given = said("--help", "--config", file)
    assert f"(default: 0.0001; c.py: 0.0003)" in given and "unless the config file" not in given
    assert said("--config", file, "-h") == given
    for plain in (said("--help"), said("--help", "--config", str(tmp_path / "none.py"))):
        assert "(default: 0.0001, unless the config file sets it)" in plain and "0.0003" not in plain


def test_own_flags_of_a_door(file):
    """A door's flags are typed by their defaults."""
    _, own = load(file, "--max-count", "3", "--loud", extra={"max_count": (1, "n"), "loud": (False, "b"), "name": ("x", "s")})
    assert own == {"max_count": 3, "loud": True, "name": "x"}


def test_json_round_trip_and_rules_hold_for_defaults():
    """to_json and from_json are inverse; every default obeys its own rule; integers are accepted for numbers."""
    config = validate(Config())
    assert from_json(to_json(config)) == config
    changed = validate(override(config, {"train.learning_rate": 1}))
    assert changed.train.learning_rate == 1.0
    with pytest.raises(QtjaxError, match="train.learning_rat: no such field; did you mean"):
        override(config, {"train.learning_rat": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.rows = 3


def test_doors_print_one_line_and_exit_2(capsys):
    """Bad input leaves no traceback; other errors keep theirs."""

    def bad():
        raise QtjaxError("what, where, rule, remedy")

    with pytest.raises(SystemExit) as exit_:
        door(bad)
    assert exit_.value.code == 2 and capsys.readouterr().err == "error: what, where, rule, remedy\n"
    with pytest.raises(ZeroDivisionError):
        door(lambda: 1 / 0)

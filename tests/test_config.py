"""The configuration: time limits, YAML, layers, errors that name everything, and round trips."""

from __future__ import annotations

import ast
import errno
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcresume import config
from hpcresume.config import schema
from hpcresume.errors import ConfigError, NotFound

NOTHING: dict[str, str] = {"HPCRESUME_SITE": os.devnull}

Load = Callable[..., config.RunConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a text as the file of a run, with no other layer unless given."""

    def load_text(
        text: str | bytes = "seed: 0", environ: Mapping[str, str] = NOTHING, **layers: Any
    ) -> config.RunConfig:
        path = tmp_path / "run 'one'.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return config.load(path, environ={**NOTHING, **environ}, **layers)

    return load_text


@pytest.fixture
def errors(load: Load) -> Callable[..., list[str]]:
    """The sentences with which a text is refused."""

    def errors_of(*args: Any, **layers: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(*args, **layers)
        return str(caught.value).splitlines()

    return errors_of


quick = settings(
    database=None,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# Time limits


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("007", 420),
        ("0:01", 1),
        ("90:30", 5430),
        ("02:00:00", 7200),
        ("30:00:00", 108000),
        ("1-0", 86400),
        ("1-12", 129600),
        ("0-30", 108000),
        ("1-12:30", 131400),
        ("2-03:04:05", 183845),
        (" 15 ", 900),
    ],
)
def test_parse_time_reads_every_form_of_sbatch(text: str, seconds: int) -> None:
    assert config.parse_time(text) == seconds


@pytest.mark.parametrize("text", ["UNLIMITED", "infinite", "Unlimited", "-1"])
def test_parse_time_has_no_seconds_where_there_is_no_limit(text: str) -> None:
    assert config.parse_time(text) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "0", "0:00", "00:00:00", "0-0", "abc", "5m", "1.5", "-5", "+5", "25:61:00"),
        *("1:00:60", "1:60", "1-2:60", "1-2:3:60", "1:2:3:4", "1-", "-", ":", "1-2-3", "1:-2"),
        *("٣", "1\n2", "1 - 2", "9" * 5000),
    ],
)
def test_parse_time_refuses_what_is_no_time_limit_and_lists_the_forms(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a time limit; expected MM, .*D-HH:MM:SS"):
        config.parse_time(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1, "00:00:01"), (5400, "01:30:00"), (86399, "23:59:59"), (90061, "1-01:01:01")],
)
def test_format_time_writes_sbatchs_form(seconds: int, text: str) -> None:
    assert config.format_time(seconds) == text


def test_format_time_has_a_word_for_no_limit() -> None:
    assert config.parse_time(config.format_time(None)) is None


@quick
@given(st.integers(1, 10**9))
def test_parse_time_reads_what_format_time_writes(seconds: int) -> None:
    assert config.parse_time(config.format_time(seconds)) == seconds


@quick
@given(st.text(alphabet="0123456789:- .ab", max_size=12) | st.text())
def test_parse_time_gives_seconds_or_config_error_for_any_text(text: str) -> None:
    try:
        seconds = config.parse_time(text)
    except ConfigError:
        return
    assert seconds is None or seconds > 0


# The structs


def _structs() -> list[type[msgspec.Struct]]:
    kinds = vars(schema).values()
    return [k for k in kinds if isinstance(k, type) and issubclass(k, msgspec.Struct)]


def test_every_field_is_followed_by_its_docstring() -> None:
    tree = ast.parse(Path(schema.__file__).read_text())
    names = {struct.__name__ for struct in _structs()}
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in names]
    bare = [
        f"{node.name}.{field.target.id}"
        for node in classes
        for field, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]
    assert (len(classes), bare) == (8, [])


@pytest.mark.parametrize("struct", _structs())
def test_structs_are_frozen_keyword_only_and_closed(struct: type[msgspec.Struct]) -> None:
    options = struct.__struct_config__
    assert (options.frozen, options.forbid_unknown_fields) == (True, True)
    with pytest.raises(TypeError, match="positional"):
        struct("x")


def test_defaults_of_two_configurations_are_not_shared() -> None:
    assert config.RunConfig().args is not config.RunConfig().args


def test_check_complete_accepts_a_training_function_and_an_end() -> None:
    config.check_complete(config.RunConfig(train="train.py", epochs=1))


def test_check_complete_names_everything_that_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"'train' is missing.*\n.*'max_steps' and 'epochs'"):
        config.check_complete(config.RunConfig())


# YAML


def test_time_with_colons_stays_text(load: Load) -> None:
    assert load("scheduler: {time: 1:30:00}").scheduler.time == "1:30:00"


def test_bare_number_as_time_means_minutes(load: Load) -> None:
    assert config.parse_time(load("scheduler: {time: 90}").scheduler.time or "") == 5400


def test_number_for_a_text_field_keeps_its_digits(load: Load) -> None:
    assert load("scheduler: {account: 0123}").scheduler.account == "0123"
    assert load("name: 20250101_2").name == "20250101_2"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("12", 12),
        ("-3", -3),
        ("007", "007"),
        ("1_000", "1_000"),
        ("0x1f", "0x1f"),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("inf", "inf"),
        ("'a: *b'", "a: *b"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_scalar_in_yaml_means_what_it_looks_like(load: Load, text: str, value: Any) -> None:
    found = load(f"args:\n  x: {text}")
    assert repr(found.args["x"]) == repr(value)


def test_keys_are_always_text(load: Load) -> None:
    assert load("args: {1: a, no: b, null: c}").args == {"1": "a", "no": "b", "null": "c"}


def test_whole_number_may_be_written_with_an_exponent(load: Load) -> None:
    assert repr(load("max_steps: 1e5").max_steps) == "100000"


def test_section_with_only_its_key_leaves_the_defaults(load: Load) -> None:
    assert load("checkpoint:\nargs:\nscheduler: {setup: , sbatch: }") == config.RunConfig()


def test_byte_order_mark_is_passed_over(load: Load) -> None:
    assert load(b"\xef\xbb\xbfname: x").name == "x"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("seed: 1\nseed: 2", 2, "'seed' is given twice, first at .*:1"),
        ("log:\n  level: INFO\n  level: INFO", 3, "'log.level' is given twice"),
        ("a: {'b': 1, b: 1}", 1, "'a.b' is given twice"),
        ("seed: 1\nname: [1", 2, "not valid YAML"),
        ("seed: 1\n\tname: x", 2, r"not valid YAML: .*(tab|\\t)"),
        ("seed: 1\nname: x: y", 2, "not valid YAML: mapping values"),
        ("seed: 1\nname: 'x", 2, "not valid YAML"),
        ("seed: 1\n\nname: \x01", 3, "not valid YAML: .*characters are not allowed"),
        ("seed: &x 1", 1, "anchors and aliases"),
        ("seed: *x", 1, "anchors and aliases"),
        ("seed: !!int 1", 1, "tags"),
        ("args: !!python/object/apply:os.getcwd []", 1, "tags"),
        ("? [1]\n: 2", 1, "a key must be a word"),
        ("args:\n  '': 2", 2, "a key must be a word"),
        ("seed: 1\n---\nseed: 2", 2, "a second document"),
        ("args: " + "[" * 40, 1, "nested deeper"),
        ("[" * 900_000, 1, "nested deeper"),
        (b"seed: 1\nname: \xff", 2, "not UTF-8"),
    ],
)
def test_broken_yaml_is_one_sentence_with_file_and_line(
    errors: Callable[..., list[str]], tmp_path: Path, text: str | bytes, line: int, what: str
) -> None:
    (sentence,) = errors(text)
    assert sentence.startswith(f"{tmp_path}/run 'one'.yaml:{line}: ")
    assert re.search(what, sentence)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("---\n", "is empty"),
        ("- a", "holds a list"),
        ("word", "holds 'word'"),
        ("#" * 1_000_001, "longer than 1 MB"),
    ],
)
def test_file_without_a_mapping_is_refused_in_one_sentence(
    errors: Callable[..., list[str]], text: str, what: str
) -> None:
    (sentence,) = errors(text)
    assert what in sentence


def test_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Is a directory"):
        config.load(tmp_path, environ=NOTHING)


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match=r"loop\.yaml: cannot be read"):
        config.load(loop, environ=NOTHING)


def test_trouble_of_the_disk_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 1\n")

    def refuses(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(OSError, match="Stale file handle"):
        config.load(path, environ=NOTHING)


def test_path_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="null byte"):
        config.load(Path("a\0b"), environ=NOTHING)


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        config.load(tmp_path / "none.yaml", environ=NOTHING)


# Errors


def test_all_findings_of_a_document_come_together(errors: Callable[..., list[str]]) -> None:
    found = errors("sead: 1\ncheckpoint:\n  step: 5\n  keep_last: 0\nlog: {level: 3}", sets=["x=1"])
    assert [sentence.rpartition(".yaml")[2][:3] for sentence in found[:-1]] == [
        ":1:",
        ":3:",
        ":4:",
        ":5:",
    ]
    assert found[-1].startswith("--set x=1: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("checkpoint: {step: 5}", "unknown key 'checkpoint.step'; did you mean 'steps'?"),
        ("max-steps: 5", "unknown key 'max-steps'; did you mean 'max_steps'?"),
        ("scheduler: {gpus: 5}", "unknown key 'scheduler.gpus'; did you mean 'gpus_per_node'?"),
        ("time: 5", "unknown key 'time'; 'time' belongs under 'scheduler'."),
        ("chain: {seed: 5}", "unknown key 'chain.seed'; 'seed' belongs at the top level."),
        ("image: x", "unknown key 'image'; 'image' belongs under 'scheduler.container'."),
        ("log: {qqq: 1}", "unknown key 'log.qqq'; expected one of every_steps, level, trackers."),
        ("seed: -1", "seed is -1; expected a whole number from 0 to 4294967295."),
        ("seed: true", "seed is true; expected a whole number from 0 to 4294967295."),
        ("seed: 1.5", "seed is 1.5; expected a whole number from 0 to 4294967295."),
        ("seed:", "seed is null; expected a whole number from 0 to 4294967295."),
        ("deterministic: yes", "deterministic is 'yes'; expected true or false."),
        ("chain: {ahead: 9}", "chain.ahead is 9; expected a whole number from 1 to 8."),
        ("chain: {max_hours: 0}", "chain.max_hours is 0; expected a number above 0, or null."),
        ("chain: {lead_s: .inf}", "chain.lead_s is inf; expected a finite number."),
        ("args: {a: {b: [.nan]}}", "args.a.b[0] is nan; expected a finite number."),
        ("args: {a: 1e999}", "args.a is inf; expected a finite number."),
        (
            "max_steps: 1e300",
            "max_steps is too large; expected a whole number of at most 64 bits.",
        ),
        ("scheduler: 5", "scheduler is 5; expected a mapping."),
        ("scheduler: {setup: x}", "scheduler.setup is 'x'; expected a list of text."),
        ("scheduler: {setup: [[]]}", "scheduler.setup[0] is a list; expected text."),
        (
            "resume: aut",
            "resume is 'aut'; expected one of auto, ask, never; did you mean 'auto'?",
        ),
        (
            "name: 1.5",
            "name is 1.5; expected at most 100 letters, digits, '.', '_' and '-', "
            "not starting with '.' or '-', or null; put text in quotes.",
        ),
        (
            'scheduler: {partition: "a\\n#SBATCH -b"}',
            "scheduler.partition is 'a\\n#SBATCH -b'; "
            "expected non-empty text on one line, or null.",
        ),
        (
            "scheduler: {sbatch: {mail_type: END}}",
            "scheduler.sbatch has the key 'mail_type'; expected the long name of an sbatch option, "
            "as in 'mail-type: END'.",
        ),
        (
            "scheduler: {sbatch: {time: 5}}",
            "scheduler.sbatch has the key 'time'; write scheduler.time instead.",
        ),
        (
            "scheduler: {container: {runtime: pyxis}}",
            "scheduler.container.image is missing; expected an image.",
        ),
    ],
)
def test_finding_says_what_was_found_and_what_is_expected(
    errors: Callable[..., list[str]], text: str, sentence: str
) -> None:
    (found,) = errors(text)
    assert found.partition(".yaml:1: ")[2] == sentence


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "a b", "a\n", "é", "x" * 101, ".."])
def test_name_that_is_no_good_directory_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name is "):
        config.from_mapping({"name": name}, "test")


@pytest.mark.parametrize("name", ["a", "_a", "1", "a.b-c_D", "x" * 100])
def test_name_of_harmless_characters_is_accepted(name: str) -> None:
    assert config.from_mapping({"name": name}, "test").name == name


def test_impossible_time_is_a_finding_at_its_place(errors: Callable[..., list[str]]) -> None:
    (found,) = errors("scheduler:\n  time: 25:61:00")
    assert ".yaml:2: scheduler.time: '25:61:00' is not a time limit; expected MM," in found


def test_mapping_is_named_by_its_source() -> None:
    with pytest.raises(ConfigError, match=r"^the test: seed is a set; expected a whole number"):
        config.from_mapping({"seed": {1}}, "the test")


@pytest.mark.parametrize("key", ["name", "train", "seed", "max_steps", "args", "log"])
def test_enormous_number_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^test: {key} is too large"):
        config.from_mapping({key: 10**5000}, "test")


@pytest.mark.parametrize("value", [{1}, b"x", Path("x"), 2**63, "\ud800", {1: 2}, {"": 1}])
def test_argument_that_no_file_can_hold_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^test: args\.x "):
        config.from_mapping({"args": {"x": value}}, "test")


def test_argument_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises(ConfigError, match="nested deeper"):
        config.from_mapping({"args": loop}, "test")


# Layers


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("last", ["site", "user", "file", "environ", "options", "sets"])
def test_later_layer_wins_over_all_before_it(tmp_path: Path, last: str) -> None:
    order = ["site", "user", "file", "environ", "options", "sets"]
    given = order[: order.index(last) + 1]
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), **NOTHING}
    line = "scheduler: {{partition: {}}}"
    if "site" in given:
        environ["HPCRESUME_SITE"] = str(_write(tmp_path / "site.yaml", line.format("site")))
    if "user" in given:
        _write(tmp_path / "xdg/hpcresume/config.yaml", line.format("user"))
    path = _write(tmp_path / "run.yaml", line.format("file") if "file" in given else "seed: 0")
    if "environ" in given:
        environ["SBATCH_PARTITION"] = "environ"
    options = {"scheduler": {"partition": "options" if "options" in given else None}}
    sets = ["scheduler.partition=sets"] if "sets" in given else []
    found = config.load(path, sets=sets, options=options, environ=environ)
    assert found.scheduler.partition == last


def test_mappings_of_layers_are_merged_deeply(load: Load) -> None:
    found = load("args: {a: {b: 1, c: 2}}", options={"args": {"a": {"c": 3}}}, sets=["args.a.d=4"])
    assert found.args == {"a": {"b": 1, "c": 3, "d": 4}}


def test_lists_of_layers_replace_each_other(load: Load) -> None:
    found = load("scheduler: {setup: [a, b]}", sets=["scheduler.setup=[c]"])
    assert found.scheduler.setup == ["c"]


def test_null_takes_back_a_section_of_an_earlier_layer(tmp_path: Path, load: Load) -> None:
    site = _write(tmp_path / "site.yaml", "scheduler: {container: {image: x.sif}}")
    environ = {"HPCRESUME_SITE": str(site)}
    assert load("scheduler: {container: null}", environ).scheduler.container is None


def test_container_may_be_given_by_several_layers(tmp_path: Path, load: Load) -> None:
    site = _write(tmp_path / "site.yaml", "scheduler: {container: {mounts: [/data]}}")
    found = load("seed: 1", {"HPCRESUME_SITE": str(site)}, sets=["scheduler.container.image=x"])
    assert found.scheduler.container == config.ContainerConfig(image="x", mounts=["/data"])


def test_kind_of_memory_of_a_later_layer_takes_back_the_earlier_kind(load: Load) -> None:
    found = load("scheduler: {mem: 64G}", {"SBATCH_MEM_PER_CPU": "4G"})
    assert (found.scheduler.mem, found.scheduler.sbatch) == (None, {"mem-per-cpu": "4G"})
    found = load("seed: 1", {"SBATCH_MEM_PER_CPU": "4G"}, sets=["scheduler.mem=64G"])
    assert (found.scheduler.mem, found.scheduler.sbatch) == ("64G", {})


def test_no_file_gives_the_defaults() -> None:
    assert config.load(None, environ=NOTHING) == config.RunConfig()


def test_user_file_lies_below_home_by_default(tmp_path: Path) -> None:
    _write(tmp_path / ".config/hpcresume/config.yaml", "seed: 7")
    for xdg in ({}, {"XDG_CONFIG_HOME": ""}, {"XDG_CONFIG_HOME": "relative"}):
        assert config.load(None, environ={"HOME": str(tmp_path), **NOTHING, **xdg}).seed == 7


def test_user_file_with_comments_only_is_no_error(tmp_path: Path) -> None:
    _write(tmp_path / ".config/hpcresume/config.yaml", "# later")
    assert config.load(None, environ={"HOME": str(tmp_path), **NOTHING}).seed == 0


def test_a_home_that_is_no_folder_has_no_user_file() -> None:
    for name in ("HOME", "XDG_CONFIG_HOME"):
        assert config.load(None, environ={name: os.devnull, **NOTHING}) == config.RunConfig()


def test_site_file_that_is_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"site\.yaml"):
        config.load(None, environ={"HPCRESUME_SITE": str(tmp_path / "site.yaml")})


def test_finding_in_the_site_file_names_it(tmp_path: Path, load: Load) -> None:
    site = _write(tmp_path / "site.yaml", "\nseeed: 7")
    with pytest.raises(ConfigError, match=r"/site\.yaml:2: unknown key 'seeed'; did you mean"):
        load("seed: 1", {"HPCRESUME_SITE": str(site)})


@pytest.mark.parametrize(
    ("variable", "field", "value"),
    [
        ("SBATCH_ACCOUNT=12", "account", "12"),
        ("SBATCH_CONSTRAINT=a&b", "constraint", "a&b"),
        ("SBATCH_GPUS_PER_NODE=4", "gpus_per_node", 4),
        ("SBATCH_GPUS_PER_NODE=a100:4", "gpus_per_node", "a100:4"),
        ("SBATCH_MEM_PER_NODE=64G", "mem", "64G"),
        ("SBATCH_PARTITION=a,b", "partition", "a,b"),
        ("SBATCH_QOS=high", "qos", "high"),
        ("SBATCH_TIMELIMIT=1-12", "time", "1-12"),
    ],
)
def test_variable_of_sbatch_sets_its_field(
    load: Load, variable: str, field: str, value: Any
) -> None:
    name, _, text = variable.partition("=")
    assert getattr(load("scheduler: {mem: 1G}", {name: text}).scheduler, field) == value


@pytest.mark.parametrize(
    ("environ", "sbatch"),
    [
        ({"SBATCH_RESERVATION": "r"}, {"reservation": "r"}),
        ({"SBATCH_GRES": "gpu:1"}, {"gres": "gpu:1"}),
        ({"SBATCH_GPUS": "8"}, {"gpus": "8"}),
        ({"SBATCH_WCKEY": "k"}, {"wckey": "k"}),
        ({"SBATCH_WCKEY": ""}, {}),
        ({"SBATCH_EXCLUSIVE": ""}, {"exclusive": True}),
        ({"SBATCH_EXCLUSIVE": "user"}, {"exclusive": "user"}),
        ({"SBATCH_OVERCOMMIT": ""}, {"overcommit": True}),
        ({"SBATCH_OVERCOMMIT": "1"}, {"overcommit": True}),
        ({"SBATCH_OVERCOMMIT": "yes"}, {"overcommit": True}),
        ({"SBATCH_OVERCOMMIT": "0"}, {}),
        ({"SBATCH_OVERCOMMIT": "no"}, {}),
        ({"SBATCH_REQ_SWITCH": "1"}, {"switches": "1"}),
        ({"SBATCH_REQ_SWITCH": "1", "SBATCH_WAIT4SWITCH": "60"}, {"switches": "1@60"}),
        ({"SBATCH_UNHEARD_OF": "1", "SLURM_GRES": "x", "SBATCH_": "x"}, {}),
    ],
)
def test_variable_of_sbatch_without_a_field_becomes_an_option(
    load: Load, environ: dict[str, str], sbatch: dict[str, Any]
) -> None:
    assert load("seed: 1", environ).scheduler.sbatch == sbatch


@pytest.mark.parametrize(
    "word",
    [
        *("ARRAY_INX", "ERROR", "EXPORT", "INPUT", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE"),
        *("OUTPUT", "REQUEUE", "SIGNAL", "WAIT", "DEBUG", "GET_USER_ENV"),
    ],
)
def test_variable_that_the_chain_decides_itself_is_not_taken(load: Load, word: str) -> None:
    assert load("seed: 0", {f"SBATCH_{word}": "1"}) == config.RunConfig()


def test_finding_in_a_variable_names_the_variable(errors: Callable[..., list[str]]) -> None:
    (found,) = errors("seed: 1", {"SBATCH_TIMELIMIT": "soon"})
    assert found.startswith("SBATCH_TIMELIMIT: scheduler.time: 'soon' is not a time limit")


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ("4-2", "scheduler.nodes: 4-2: the least comes first, so write 2-4"),
        ("2-", "scheduler.nodes is '2-'; expected a whole number of at least 1, or a range"),
        ("0-2", "scheduler.nodes is '0-2'; expected a whole number of at least 1, or a range"),
        ("many", "scheduler.nodes is 'many'; expected a whole number of at least 1, or a range"),
    ],
)
def test_a_range_of_nodes_that_is_none_is_refused(
    errors: Callable[..., list[str]], nodes: str, found: str
) -> None:
    (said,) = errors(f"scheduler: {{nodes: '{nodes}'}}")
    assert found in said


def test_a_range_of_nodes_has_a_least_and_a_most(load: Load) -> None:
    assert load("scheduler: {nodes: 2-4}").scheduler.nodes == "2-4"
    assert config.node_range("2-4") == (2, 4)
    assert config.node_range(3) == (3, 3)


def test_links_on_one_machine_meet_every_size_of_a_range() -> None:
    assert [config.nodes_in_turn("2-4", number) for number in range(1, 6)] == [4, 3, 2, 4, 3]
    assert [config.nodes_in_turn(2, number) for number in range(1, 4)] == [2, 2, 2]


def test_finding_in_a_flag_names_the_command_line(errors: Callable[..., list[str]]) -> None:
    (found,) = errors("seed: 1", options={"scheduler": {"nodes": 0}})
    assert found.startswith("command line: scheduler.nodes is 0; expected a whole number")


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("x=1e-3", 0.001),
        ("x=", None),
        ("x=''", ""),
        ("x=true", True),
        ("x=[1, a]", [1, "a"]),
        ("x={a: {b: 2}}", {"a": {"b": 2}}),
        ("x=a=b", "a=b"),
        ("x=Q: what #1?", "Q: what #1?"),
        ("x=*.py", "*.py"),
        ("x=!a", "!a"),
        ("x= 5 ", 5),
        ('x="5"', "5"),
        ("x.y-z.1=2", {"y-z": {"1": 2}}),
    ],
)
def test_set_reads_its_value_as_yaml(load: Load, assignment: str, value: Any) -> None:
    assert repr(load("seed: 0", sets=[f"args.{assignment}"]).args["x"]) == repr(value)


def test_set_of_nothing_is_null(load: Load) -> None:
    assert load("epochs: 3", sets=["epochs="]).epochs is None


@pytest.mark.parametrize("text", ["", "seed", "=1", ".=1", "a..b=1", "seed.=1", "args.x=[1"])
def test_set_that_is_no_assignment_is_refused_by_its_own_words(
    errors: Callable[..., list[str]], text: str
) -> None:
    (found,) = errors("seed: 0", sets=[text])
    assert found.startswith(f"--set {text}:")


@pytest.mark.parametrize("text", ["seed.x=1", "scheduler.setup.0=x", "args.a.b=1", "args.a.b.c=1"])
def test_set_through_a_value_is_refused(errors: Callable[..., list[str]], text: str) -> None:
    (found,) = errors("args: {a: 1}", sets=[text])
    assert re.match(f"--set {text}: .* mapping", found)


# Round trips and differences

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        *("yes", "1e-3", "1:30", "null", "007", "~", "", "true", ".inf", "0x1f", "=", "<<"),
        *("2024-01-01", "a\nb\n", " a", "a ", "#", "- a", "a: b", "'", '"', "😀"),
        *("\x85", "\u2028", "\ufeff", "\0"),
    ]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words
)
keys = words.filter(bool)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=8
)
lines = words.filter(lambda text: text and not set(text) & set("\0\r\n"))
mappings = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"\A[a-z0-9_][A-Za-z0-9._-]{0,20}\Z"),
        "train": words,
        "args": st.dictionaries(keys, values, max_size=4),
        "seed": st.integers(0, 2**32 - 1),
        "max_steps": st.none() | st.integers(1, 10**12),
        "checkpoint": st.fixed_dictionaries(
            {}, optional={"minutes": st.none() | st.floats(1e-300, 1e300), "keep_best": st.just(0)}
        ),
        "scheduler": st.fixed_dictionaries(
            {},
            optional={
                "time": st.sampled_from(["90", "1:30:00", "1-12", "UNLIMITED", "-1"]),
                "gpus_per_node": st.none() | st.integers(0, 16) | lines,
                "partition": st.none() | lines,
                "setup": st.lists(words, max_size=3),
                "container": st.fixed_dictionaries({"image": lines, "args": st.lists(words)}),
                "sbatch": st.dictionaries(
                    st.sampled_from(["exclusive", "mail-type", "no-kill"]),
                    st.none() | st.booleans() | st.integers(0, 9) | lines,
                ),
            },
        ),
    },
)


@quick
@given(mappings)
def test_frozen_configuration_is_read_back_equal(tmp_path: Path, mapping: dict[str, Any]) -> None:
    made = config.from_mapping(mapping, "test")
    path = tmp_path / "run.yaml"
    path.write_text(config.dump(made), encoding="utf-8")
    read = config.read_frozen(path)
    assert read == made
    assert config.difference(made, read) == []


@quick
@given(mappings)
def test_to_mapping_is_read_back_equal(mapping: dict[str, Any]) -> None:
    made = config.from_mapping(mapping, "test")
    assert config.from_mapping(config.to_mapping(made), "test") == made


def test_dump_has_every_key_in_the_order_of_declaration() -> None:
    found = yaml.safe_load(config.dump(config.RunConfig()))
    assert list(found) == list(config.RunConfig.__struct_fields__)
    assert list(found["scheduler"]) == list(config.SchedulerConfig.__struct_fields__)


def test_dump_repeats_a_value_that_is_used_twice() -> None:
    shared = [1]
    made = config.RunConfig(args={"a": shared, "b": shared})
    assert yaml.safe_load(config.dump(made))["args"] == {"a": [1], "b": [1]}
    assert "&" not in config.dump(made)


def test_other_readers_of_yaml_see_the_same_texts() -> None:
    args = {"a": "yes", "b": "1:30", "c": "1e-3", "d": "2024-01-01", "e": "007"}
    assert yaml.safe_load(config.dump(config.RunConfig(args=args)))["args"] == args


@pytest.mark.parametrize("text", ["1e-3", "-0", "1e5", "yes", "~", "", "a\nb\n", "\x85", "1.5"])
def test_text_that_looks_like_something_else_stays_text_when_frozen(
    tmp_path: Path, text: str
) -> None:
    path = _write(tmp_path / "run.yaml", config.dump(config.RunConfig(args={"x": text})))
    assert config.read_frozen(path).args == {"x": text}


def test_frozen_configuration_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "run.yaml", config.dump(config.RunConfig()) + "later: 1\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:\d+: unknown key 'later'"):
        config.read_frozen(path)


def test_missing_frozen_configuration_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        config.read_frozen(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({}, {}, []),
        ({"args": {"a": 1, "b": 2}}, {"args": {"b": 2, "a": 1}}, []),
        (
            {"scheduler": {"time": "01:00:00"}},
            {"scheduler": {"time": "02:00:00"}},
            ["scheduler.time: 01:00:00 -> 02:00:00"],
        ),
        ({"args": {"a": 1}}, {"args": {"a": True}}, ["args.a: 1 -> true"]),
        ({"args": {"a": 1}}, {"args": {"a": "1"}}, ['args.a: 1 -> "1"']),
        ({"args": {"a": "1"}}, {"args": {"a": '"1"'}}, ['args.a: "1" -> "1"']),
        ({"args": {"a": {"b": 1}}}, {}, ["args.a.b: 1 -> (not set)"]),
        ({"args": {"a": None}}, {"args": {}}, ["args.a: null -> (not set)"]),
        ({"args": {"a": None}}, {"args": {"a": {}}}, ["args.a: null -> {}"]),
        ({"epochs": 2}, {"max_steps": 9}, ["max_steps: null -> 9", "epochs: 2 -> null"]),
        (
            {"scheduler": {"setup": ["a"]}},
            {"scheduler": {"setup": []}},
            ['scheduler.setup: ["a"] -> []'],
        ),
    ],
)
def test_difference_names_every_leaf_that_changed(
    old: dict[str, Any], new: dict[str, Any], lines: list[str]
) -> None:
    made = config.from_mapping(old, "old"), config.from_mapping(new, "new")
    assert config.difference(*made) == lines


def test_difference_lists_the_fields_of_a_new_section() -> None:
    new = config.from_mapping({"scheduler": {"container": {"image": "x.sif"}}}, "new")
    found = config.difference(config.RunConfig(), new)
    assert "scheduler.container.image: (not set) -> x.sif" in found


# The default file


def test_default_path_prefers_the_file_of_the_directory(tmp_path: Path) -> None:
    assert config.default_path(tmp_path) is None
    quickstart = _write(tmp_path / "configs/quickstart.yaml", "seed: 1")
    assert config.default_path(tmp_path) == quickstart
    own = _write(tmp_path / "hpcresume.yaml", "seed: 1")
    assert config.default_path(tmp_path) == own


def test_default_path_passes_over_a_directory(tmp_path: Path) -> None:
    (tmp_path / "hpcresume.yaml").mkdir()
    assert config.default_path(tmp_path) is None


# Nonsense

pieces = st.lists(
    st.sampled_from(":{}[],-?|>&*!%@#'\"~\n\t \0\x85\ud800\ufeff:::")
    | st.sampled_from(["seed", "args", "scheduler", "time", "checkpoint", "steps", "sbatch", "a"])
    | st.sampled_from(["null", "true", "1", "1e3", ".inf", "<<", "---", "...", "\n  ", ": "]),
    max_size=15,
).map("".join)


def _assert_config_or_config_error(load_it: Callable[[], config.RunConfig]) -> None:
    try:
        found = load_it()
    except ConfigError as error:
        sentences = str(error)
    else:
        sentences = config.dump(found)
    assert sentences.encode()


@settings(quick, max_examples=100)
@given(st.text() | pieces)
def test_any_text_as_file_gives_a_configuration_or_config_error(load: Load, text: str) -> None:
    _assert_config_or_config_error(lambda: load(text.encode(errors="surrogatepass")))


@quick
@given(st.binary())
def test_any_bytes_as_file_give_a_configuration_or_config_error(load: Load, data: bytes) -> None:
    _assert_config_or_config_error(lambda: load(data))


@settings(quick, max_examples=100)
@given(
    st.lists(
        pieces
        | st.text()
        | st.tuples(
            st.sampled_from(["args.a", "args.a.b", "seed", "scheduler", "scheduler.sbatch.x-y"]),
            pieces | st.text(),
        ).map("=".join),
        max_size=3,
    )
)
def test_any_text_as_set_gives_a_configuration_or_config_error(sets: list[str]) -> None:
    _assert_config_or_config_error(lambda: config.load(None, sets=sets, environ=NOTHING))


@quick
@given(
    st.dictionaries(
        st.text() | st.sampled_from(sorted(config.RunConfig.__struct_fields__)),
        st.recursive(
            scalars | st.floats() | st.binary(),
            lambda v: st.lists(v) | st.dictionaries(st.text() | st.integers(), v),
            max_leaves=5,
        ),
    )
)
def test_any_mapping_gives_a_configuration_or_config_error(mapping: dict[str, Any]) -> None:
    _assert_config_or_config_error(lambda: config.from_mapping(mapping, "test"))


def test_path_of_a_thousand_keys_is_refused() -> None:
    sets = ["args." + "a." * 1000 + "b=1"] * 2
    with pytest.raises(ConfigError, match=r"args\.a\.a is nested deeper"):
        config.load(None, sets=sets, environ=NOTHING)

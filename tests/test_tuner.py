"""The search for faster launch configs, with stand-in jobs: what it tries, keeps, skips and leaves."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import settings
from tuning_cases import BROKEN, GPU, interrupted_at, without_files

from dyreg_triton import tuning
from dyreg_triton.configs import files
from dyreg_triton.tuning import Config, Key, engine

SIDES = (16, 32, 64, 128)
GRID = [Config(8, c, p) for c in SIDES for p in SIDES]
KEYS = [Key("region", kind, "16-bit", (256, 16, 512, 196)) for kind in ("gather", "scatter", "dense", "dense_moments")]


@pytest.fixture(autouse=True)
def _no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with without_files(tmp_path, monkeypatch):
        yield


# --- stand-ins ------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when somebody says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Events(list):
    """What jobs were asked, in order; Ctrl-C comes at the n-th."""

    def __init__(self, stop: int | None = None):
        super().__init__()
        self.stop = stop

    def note(self, what: str, key: Key, config: Any = None) -> None:
        if len(self) == self.stop:
            raise KeyboardInterrupt
        self.append((what, key, config))

    def of(self, what: str, key: Key | None = None) -> list[Any]:
        return [config for name, k, config in self if name == what and key in (None, k)]


@dataclass
class Landscape:
    """A job whose times are in a table: one for each config, or one for each time that it is measured."""

    key: Key
    default: Config
    times: Mapping[Config, float | Sequence[float]]
    events: Events = field(default_factory=Events)
    refused: Mapping[Config, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    cost: float = 0.0  # of a measurement, by the clock
    measured: dict[Config, int] = field(default_factory=dict)

    def neighbours(self, config: Any) -> list[Config]:
        self.events.note("neighbours", self.key, config)
        c, p = config.block_c, config.block_p
        near = [(c * 2, p), (c // 2, p), (c, p * 2), (c, p // 2)]
        return [Config(8, *blocks) for blocks in near if Config(8, *blocks) in self.times]

    def check(self, config: Any) -> None:
        self.events.note("check", self.key, config)
        if config in self.refused:
            raise engine.Refused(self.refused[config])

    def seconds(self, config: Any) -> float:
        self.events.note("seconds", self.key, config)
        self.clock.now += self.cost
        times, n = self.times[config], self.measured.get(config, 0)
        self.measured[config] = n + 1
        return times if isinstance(times, float) else times[min(n, len(times) - 1)]


def bowl(c: int, p: int, bottom: float = 1e-5) -> dict[Config, float]:
    """Times that fall toward one config, by a fifth of the least a step."""
    return {
        config: bottom * (1 + 0.2 * (abs(math.log2(config.block_c / c)) + abs(math.log2(config.block_p / p))))
        for config in GRID
    }


def at(place: int) -> Config:
    """The config at a place of a row."""
    return Config(8, 16, 64, registers=100 + place)


class Row(Landscape):
    """Configs in a row: each has two neighbours."""

    def neighbours(self, config: Any) -> list[Config]:
        self.events.note("neighbours", self.key, config)
        near = (at(config.registers - 100 + step) for step in (1, -1))
        return [other for other in near if other in self.times]


def line(*times: float | Sequence[float], key: Key = KEYS[0], **fields: Any) -> Landscape:
    """A job with a few configs in a row, of which the first is the default."""
    return Row(key, at(0), {at(i): t for i, t in enumerate(times)}, **fields)


def several(events: Events, **fields: Any) -> list[Landscape]:
    """Three that differ: one is tuned, one keeps its default, one meets refusals on its way."""
    tables = (bowl(128, 16), bowl(16, 64), bowl(64, 128, 3e-6))
    refused: tuple[dict[Config, str], ...] = ({}, {}, {Config(8, 32, 64): "spills", Config(8, 64, 128): "is wrong"})
    return [
        Landscape(key, Config(8, 16, 64), times, events, no, **fields)
        for key, times, no in zip(KEYS, tables, refused, strict=False)
    ]


def number(of: Any) -> int:
    return of if isinstance(of, int) else len(of)


def counts(summary: Any) -> tuple[int, int, int, int]:
    return tuple(number(getattr(summary, name)) for name in ("tuned", "kept", "skipped", "left"))  # type: ignore


def result(job: Landscape, path: Path, **options: Any) -> Any:
    """What a file says of a job after a run."""
    engine.run([job], path, GPU, **options)
    return files.read(path, GPU)[job.key]


# --- the search -----------------------------------------------------------------------------------------------------


def test_finds_the_fastest(tmp_path: Path) -> None:
    path, events = tmp_path / "a.json", Events()
    summary = engine.run(several(events), path, GPU)
    found = files.read(path, GPU)
    assert [found[key].config for key in KEYS[:2]] == [Config(8, 128, 16), Config(8, 16, 64)]
    assert steps(found[KEYS[2]].config, Config(8, 64, 128)) == 1  # the fastest itself is refused
    assert counts(summary) == (2, 1, 0, 0)
    assert number(summary.refused) == 2
    for key, table in zip(KEYS, (bowl(128, 16), bowl(16, 64), bowl(64, 128, 3e-6)), strict=False):
        said = found[key]
        assert said.complete is True
        assert said.default == Config(8, 16, 64)
        assert said.seconds == pytest.approx(table[said.config], rel=1e-2)
        assert said.default_seconds == pytest.approx(table[said.default], rel=1e-2)
    kept = found[KEYS[1]]
    assert (kept.config, kept.seconds) == (kept.default, kept.default_seconds)


times_of_grid = st.lists(st.integers(100, 200), min_size=len(GRID), max_size=len(GRID))


@settings(150)
@given(times_of_grid, st.sets(st.sampled_from(GRID), max_size=6), st.sampled_from(GRID))
def test_the_climb(times: list[int], refused: set[Config], default: Config) -> None:
    """In any landscape: the default first, each checked before it is timed, no neighbour of the best untried."""
    table = {config: t * 1e-6 for config, t in zip(GRID, times, strict=True)}
    refused = refused - {default}
    job = Landscape(KEYS[0], default, table, Events(), dict.fromkeys(refused, "no"))
    with tempfile.TemporaryDirectory() as folder:
        said = result(job, Path(folder) / "a.json")
    asked = [(what, config) for what, _, config in job.events if what != "neighbours"]
    assert asked[:2] == [("check", default), ("seconds", default)]
    checked, timed = job.events.of("check"), job.events.of("seconds")
    assert len(checked) == len(set(checked))
    assert set(timed) == set(checked) - refused
    for config in set(timed):
        assert asked.index(("check", config)) < asked.index(("seconds", config))
    best = min(table[config] for config in timed)
    bests = [config for config in set(timed) if table[config] == best]
    tried = [{c for c in GRID if steps(c, b) == 1} <= set(checked) for b in bests]
    assert any(tried), "the climb ended where a neighbour was untried"
    for config in set(checked) - {default}:  # and went nowhere else
        assert any(steps(config, other) == 1 for other in set(timed) - {config})
    twice = {config for config in timed if timed.count(config) > 1}
    assert twice <= {default, *bests}
    assert max(map(timed.count, timed)) <= 2
    expected = best if best < 0.97 * table[default] else table[default]
    assert table[said.config] == expected
    assert said.config == default or expected < table[default]
    assert said.complete


def steps(a: Config, b: Config) -> float:
    return abs(math.log2(a.block_c / b.block_c)) + abs(math.log2(a.block_p / b.block_p))


def test_climbs_from_the_best(tmp_path: Path) -> None:
    """Not from everything that is faster than the default: a row of eight is walked, not a grid filled."""
    job = line(*[1e-3 * 0.9**i for i in range(8)])
    assert result(job, tmp_path / "a.json").config == at(7)
    for slower in (0.95, 0.9000001, 0.9):  # what lies behind one that is not faster is not looked for
        job = line(1.0, 0.9, slower, 0.1)
        assert result(job, tmp_path / f"{slower}.json").config == at(1)
        assert at(3) not in job.events.of("check")


THREE_PER_CENT: dict[str, tuple[Any, Any, bool, float, float]] = {
    # times of the default, of the other; whether the other is taken; what the file says of the chosen, of the default
    "just 3 %": (1.0, 0.97, False, 1.0, 1.0),
    "a bit more": (1.0, math.nextafter(0.97, 0), True, 0.97, 1.0),
    "2 %": (1.0, 0.98, False, 1.0, 1.0),
    "4 %": (1.0, 0.96, True, 0.96, 1.0),
    "as fast": (1.0, 1.0, False, 1.0, 1.0),
    "slower": (1.0, 1.5, False, 1.0, 1.0),
    "luck of the other": ((1.0, 1.0), (0.9, 0.99), True, 0.9, 1.0),  # the smaller counts
    "bad luck of the default": ((1.0, 0.9), (0.9, 0.9), False, 0.9, 0.9),
    "less than it seemed": ((1.0, 0.92), (0.9, 0.95), False, 0.92, 0.92),
    "still enough": ((1.0, 0.95), (0.9, 0.95), True, 0.9, 0.95),
    "more than it seemed": ((1.0, 1.0), (0.95, 0.8), True, 0.8, 1.0),
    "just 3 % again": ((2.0, 1.0), (0.97, 0.97), False, 1.0, 1.0),
    "the default was faster": ((1.0, 0.5), (0.9, 0.9), False, 0.5, 0.5),
}


@pytest.mark.parametrize("case", THREE_PER_CENT)
def test_three_per_cent(tmp_path: Path, case: str) -> None:
    default, other, taken, chosen_seconds, default_seconds = THREE_PER_CENT[case]
    job = line(default, other)
    said = result(job, tmp_path / "a.json")
    assert said.config == at(1 if taken else 0)
    assert said.default == at(0)
    assert said.seconds == pytest.approx(chosen_seconds, rel=1e-3)
    assert said.default_seconds == pytest.approx(default_seconds, rel=1e-3)
    if taken:
        assert max(map(job.events.of("seconds").count, job.times)) == 2  # once more each
    else:
        assert said.seconds == said.default_seconds


def test_what_is_refused_is_passed_over(tmp_path: Path) -> None:
    """However fast it would be; and its neighbours are not asked for."""
    job = line(1.0, 0.1, 0.01, refused={at(1): "needs 300000 bytes of shared memory"})
    summary = engine.run([job], tmp_path / "a.json", GPU)
    assert counts(summary) == (0, 1, 0, 0)
    assert number(summary.refused) == 1
    assert job.events.of("seconds") == [job.default]
    assert at(2) not in job.events.of("check")


def test_odd_neighbours(tmp_path: Path) -> None:
    """Twice the same, the config itself, the default: none is tried again; none at all is an end."""
    job = line(1.0, 0.5, 0.2)
    plain = job.neighbours
    with mock.patch.object(job, "neighbours", lambda c: [*plain(c), c, *plain(c), job.default], create=True):
        assert result(job, tmp_path / "a.json").config == at(2)
    assert len(job.events.of("check")) == 3
    job = line(1.0, 0.5)
    with mock.patch.object(job, "neighbours", return_value=()):
        assert result(job, tmp_path / "b.json").config == job.default


def test_a_default_that_is_refused(tmp_path: Path) -> None:
    """An error, that names it, once all the others are done."""
    events, path = Events(), tmp_path / "a.json"
    jobs = several(events)
    jobs[0].refused = {jobs[0].default: "its results are wrong by 0.3"}
    with pytest.raises(RuntimeError) as failure:
        engine.run(jobs, path, GPU)
    assert str(KEYS[0]) in str(failure.value)
    assert "its results are wrong by 0.3" in str(failure.value)
    assert set(files.read(path, GPU)) == {KEYS[1], KEYS[2]}
    assert not events.of("seconds", KEYS[0])
    with pytest.raises(RuntimeError, match="wrong by"):  # and again, since it is not in the file
        engine.run(jobs, path, GPU)


def test_two_defaults_that_are_refused(tmp_path: Path) -> None:
    jobs = several(Events())
    for i in (0, 2):
        jobs[i].refused = {jobs[i].default: f"reason {i}"}
    with pytest.raises(RuntimeError) as failure:
        engine.run(jobs, tmp_path / "a.json", GPU)
    assert all(text in str(failure.value) for text in (str(KEYS[0]), "reason 0", str(KEYS[2]), "reason 2"))
    assert set(files.read(tmp_path / "a.json", GPU)) == {KEYS[1]}


def test_another_failure_is_not_hidden(tmp_path: Path) -> None:
    """Only `Refused` is a refusal."""
    job = line(1.0, 0.5)
    with mock.patch.object(job, "check", side_effect=ZeroDivisionError, create=True), pytest.raises(ZeroDivisionError):
        engine.run([job], tmp_path / "a.json", GPU)


def test_no_jobs(tmp_path: Path) -> None:
    assert counts(engine.run([], tmp_path / "a.json", GPU)) == (0, 0, 0, 0)


# --- what is in the file already ------------------------------------------------------------------------------------


def test_what_is_complete_is_skipped(tmp_path: Path) -> None:
    path, events = tmp_path / "a.json", Events()
    engine.run(several(Events())[:2], path, GPU)
    before = files.read(path, GPU)
    summary = engine.run(several(events), path, GPU)
    assert counts(summary) == (1, 0, 2, 0)
    assert {key for _, key, _ in events} == {KEYS[2]}
    assert files.read(path, GPU).items() >= before.items()
    events.clear()
    whole = path.read_bytes()
    assert counts(engine.run(several(events), path, GPU)) == (0, 0, 3, 0)
    assert not events
    assert path.read_bytes() == whole


def test_again(tmp_path: Path) -> None:
    path, events = tmp_path / "a.json", Events()
    engine.run(several(Events()), path, GPU)
    jobs = several(events)
    for job in jobs:
        job.times = bowl(32, 32)
    assert counts(engine.run(jobs, path, GPU, again=True)) == (3, 0, 0, 0)
    found = files.read(path, GPU)
    assert found[KEYS[0]].config == Config(8, 32, 32)
    assert {key for _, key, _ in events} == set(KEYS[:3])


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_not_usable_is_done_again(tmp_path: Path, case: str) -> None:
    path, events = tmp_path / "a.json", Events()
    engine.run(several(Events()), path, GPU)
    whole = path.read_bytes()
    BROKEN[case](path)
    spoilt = path.read_bytes()
    assert counts(engine.run(several(events), path, GPU)) == (2, 1, 0, 0)
    assert path.read_bytes() == whole
    assert (tmp_path / "a.json.unusable").read_bytes() == spoilt


def test_other_entries_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    engine.run([line(1.0, 0.5, key=KEYS[3])], path, GPU)
    before = files.read(path, GPU)[KEYS[3]]
    engine.run(several(Events()), path, GPU, again=True)
    assert files.read(path, GPU)[KEYS[3]] == before


# --- interruption ---------------------------------------------------------------------------------------------------


def test_interrupted_at_every_step(tmp_path: Path) -> None:
    """Whatever a job was doing: what was finished is in the file, and the next run ends as if nothing had been."""
    everything, whole = Events(), tmp_path / "whole.json"

    def run(events: Events, path: Path) -> Any:
        def progress(p: Any) -> None:
            events.note("progress", p.key)

        return engine.run(several(events), path, GPU, progress=progress)

    run(everything, whole)
    assert {what for what, *_ in everything} == {"neighbours", "check", "seconds", "progress"}
    for stop in range(len(everything)):
        path, events = tmp_path / f"{stop}.json", Events(stop)
        with pytest.raises(KeyboardInterrupt):
            run(events, path)
        assert list(events) == everything[:stop]
        now = files.read(path, GPU) if path.exists() else {}
        at_work = [key for what, key, _ in events if what != "progress"]
        finished = KEYS[: KEYS.index(at_work[-1])] if at_work else []
        assert {key for key in finished if key in now and now[key].complete} == set(finished)
        complete = {key for key, said in now.items() if said.complete}
        rest = Events()
        summary = run(rest, path)
        assert path.read_bytes() == whole.read_bytes(), stop
        assert number(summary.skipped) == len(complete)
        assert not {key for what, key, _ in rest if what != "progress"} & complete
        assert not (tmp_path / f"{stop}.json.unusable").exists()
        assert not [p for p in tmp_path.glob(f"{stop}.json*") if p.name not in (f"{stop}.json", f"{stop}.json.lock")]


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    path, whole, runs = tmp_path / "a.json", tmp_path / "whole.json", 0
    everything = Events()
    engine.run(several(everything), whole, GPU)
    longest = max(sum(key == k for _, k, _ in everything) for key in KEYS)
    while True:
        runs += 1
        try:
            engine.run(several(Events(longest + 1)), path, GPU)
            break
        except KeyboardInterrupt:
            assert runs < 10
    assert runs > 1
    assert path.read_bytes() == whole.read_bytes()


def test_interrupted_at_any_line(tmp_path: Path) -> None:
    """Between the jobs' own steps too, as while a result is written."""
    folder, whole = Path(tuning.__file__).parent, tmp_path / "whole.json"

    def jobs() -> list[Landscape]:
        return [line(1.0, 0.5), line(1.0, 0.99, key=KEYS[1])]

    with interrupted_at(-1, folder) as ran:
        engine.run(jobs(), whole, GPU)
    stride = max(1, ran[0] // 300)
    sizes = set()
    for stop in range(1, ran[0] + 1, stride):
        path = tmp_path / f"{stop}.json"
        with pytest.raises(KeyboardInterrupt), interrupted_at(stop, folder):
            engine.run(jobs(), path, GPU)
        found = files.read(path, GPU) if path.exists() else {}
        assert all(said.config == at(1 if key == KEYS[0] else 0) for key, said in found.items())
        sizes.add(len(found))
        engine.run(jobs(), path, GPU)
        assert path.read_bytes() == whole.read_bytes(), stop
        for left in tmp_path.glob(f"{stop}.json*"):
            left.unlink()
    assert sizes == {0, 1, 2}


# --- a budget -------------------------------------------------------------------------------------------------------


def long_jobs(clock: Clock, events: Events, count: int = 3, length: int = 100, cost: float = 1.0) -> list[Landscape]:
    """Jobs that would go on for long: each next config is faster."""
    times = [0.9**i for i in range(length)]
    return [line(*times, key=key, events=events, clock=clock, cost=cost) for key in KEYS[:count]]


def test_a_budget_is_shared_evenly(tmp_path: Path) -> None:
    path, clock, events = tmp_path / "a.json", Clock(), Events()
    begun = clock.now
    summary = engine.run(long_jobs(clock, events), path, GPU, budget=90, clock=clock)
    shares = [len(events.of("seconds", key)) for key in KEYS[:3]]
    assert all(27 <= share <= 34 for share in shares), shares
    assert clock.now - begun <= 90 + 3  # a candidate that was begun, and the second look at the winner
    found = files.read(path, GPU)
    assert set(found) == set(KEYS[:3])
    assert not any(said.complete for said in found.values())
    assert all(said.config.registers >= 100 + 24 for said in found.values())  # the best so far, not the default
    assert number(summary.left) == 0


def test_what_a_short_job_leaves_is_shared(tmp_path: Path) -> None:
    path, clock, events = tmp_path / "a.json", Clock(), Events()
    jobs = [line(1.0, 0.5, events=events, clock=clock, cost=1.0), *long_jobs(clock, events)[1:]]
    engine.run(jobs, path, GPU, budget=90, clock=clock)
    first, *rest = (len(events.of("seconds", key)) for key in KEYS[:3])
    assert first <= 4
    assert all(40 <= share <= 46 for share in rest), rest
    assert [files.read(path, GPU)[key].complete for key in KEYS[:3]] == [True, False, False]


def test_what_is_skipped_has_no_share(tmp_path: Path) -> None:
    path, clock, events = tmp_path / "a.json", Clock(), Events()
    engine.run([line(1.0, 0.5)], path, GPU)
    summary = engine.run(long_jobs(clock, events), path, GPU, budget=60, clock=clock)
    assert number(summary.skipped) == 1
    assert not events.of("seconds", KEYS[0])
    assert all(27 <= len(events.of("seconds", key)) <= 34 for key in KEYS[1:3])


def test_a_budget_that_is_spent_at_once(tmp_path: Path) -> None:
    """By the first default; the others are left, and the next run begins with them."""
    path, clock, events = tmp_path / "a.json", Clock(), Events()
    summary = engine.run(long_jobs(clock, events, cost=10.0), path, GPU, budget=5, clock=clock)
    assert number(summary.left) == 2
    assert events.of("seconds") == [at(0)]
    found = files.read(path, GPU)
    assert set(found) == {KEYS[0]}
    said = found[KEYS[0]]
    assert (said.config, said.seconds, said.complete) == (said.default, said.default_seconds, False)
    assert said.default_seconds == pytest.approx(1.0)

    events.clear()
    summary = engine.run(long_jobs(clock, events, length=3), path, GPU)
    order = list(dict.fromkeys(key for _, key, _ in events))
    assert order == [KEYS[1], KEYS[2], KEYS[0]]
    assert counts(summary) == (3, 0, 0, 0)
    assert all(said.complete for said in files.read(path, GPU).values())


def test_no_candidate_is_begun_after_it(tmp_path: Path) -> None:
    clock, events = Clock(), Events()
    deadline = clock.now + 20
    jobs = long_jobs(clock, events, count=1, cost=3.0)
    begun = []
    plain = jobs[0].check
    with mock.patch.object(jobs[0], "check", lambda c: (begun.append(clock.now), plain(c)), create=True):
        engine.run(jobs, tmp_path / "a.json", GPU, budget=20, clock=clock)
    assert len(begun) >= 5
    assert max(begun) <= deadline


def test_enough_is_as_good_as_no_budget(tmp_path: Path) -> None:
    clock = Clock()
    engine.run(several(Events(), clock=clock, cost=1.0), tmp_path / "a.json", GPU, budget=1e6, clock=clock)
    engine.run(several(Events()), tmp_path / "b.json", GPU)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_in_pieces_as_at_once(tmp_path: Path) -> None:
    """Budgets too small for all: after enough of them the file is that of one run."""
    clock, path, whole = Clock(), tmp_path / "a.json", tmp_path / "whole.json"
    engine.run(several(Events()), whole, GPU)
    for _ in range(30):
        summary = engine.run(several(Events(), clock=clock, cost=1.0), path, GPU, budget=25, clock=clock)
        if number(summary.skipped) == 3:
            break
    assert path.read_bytes() == whole.read_bytes()


# --- progress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 1000.0, 12.0])
def test_progress(tmp_path: Path, budget: float | None) -> None:
    path, clock, seen = tmp_path / "a.json", Clock(), []
    begun = clock.now

    def progress(p: Any) -> None:
        assert p.elapsed == pytest.approx(clock.now - begun)
        seen.append(p)

    engine.run(several(Events(), clock=clock, cost=1.0), path, GPU, budget=budget, clock=clock, progress=progress)
    assert {p.of for p in seen} == {3}
    assert all(0 <= p.done <= 3 for p in seen)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert {p.key for p in seen if p.key is not None} == set(KEYS[:3])
    left = [p.left_seconds for p in seen]
    assert all(seconds is None or seconds >= 0 for seconds in left)
    if budget is not None:
        assert all(s is None or s <= budget - p.elapsed + 1e-9 or s == 0 for s, p in zip(left, seen, strict=True))
    assert any(seconds is not None for seconds in left)


def test_progress_of_a_job_without_candidates(tmp_path: Path) -> None:
    seen: list[Any] = []
    engine.run([line(1.0), line(1.0, key=KEYS[1])], tmp_path / "a.json", GPU, progress=seen.append)
    assert [(p.done, p.key) for p in seen] == [(0, KEYS[0]), (1, KEYS[1])]


def test_progress_of_what_is_skipped(tmp_path: Path) -> None:
    """A bar ends full."""
    path, seen = tmp_path / "a.json", []
    engine.run(several(Events())[:2], path, GPU)
    engine.run(several(Events()), path, GPU, progress=seen.append)
    assert seen[-1].of - seen[-1].done <= 1

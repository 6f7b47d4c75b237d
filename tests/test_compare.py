"""Two sets of rows are compared case by case, and what is called slower is beyond the noise."""

import math
import random
import statistics

import pytest
from bench_rows import CPU, GPU, device, everything, overhead, static, timed, write

from bench import compare
from bench.report.rows import read

SLOWER = {"seconds": {"ours": 2.4e-3, "published": 4e-3, "compiled": 3e-3}}
FASTER = {"seconds": {"ours": 1.6e-3, "published": 4e-3, "compiled": 3e-3}}


@pytest.fixture
def files(tmp_path):
    """Writes rows to A and to B, and compares: the exit status, which goes with what is printed."""

    def compared(before, after):
        return compare.main(write(tmp_path / "a.jsonl", before), write(tmp_path / "b.jsonl", after))

    return compared


def test_equal_rows_are_the_same(files, capsys):
    rows = [*everything(CPU), *everything(GPU), static()]
    assert files(rows, rows) == 0
    said = capsys.readouterr().out
    assert "0 slower, 0 faster, 0 unclear" in said
    assert "only in" not in said


def test_slower_fails_and_faster_does_not(files, capsys):
    assert files([timed(CPU)], [timed(CPU, **SLOWER)]) == 1
    said = capsys.readouterr().out
    assert "slower   region_pool stage 16x64x28x28, N 9, center forward+backward float32 [device]" in said
    assert "2.00 -> 2.40 ms, +20.0%" in said
    assert "1 slower, 0 faster, 0 unclear, 0 same" in said
    assert files([timed(CPU)], [timed(CPU, **FASTER)]) == 0
    assert "0 slower, 1 faster, 0 unclear, 0 same" in capsys.readouterr().out


def test_a_change_within_the_noise_is_the_same(files, capsys):
    spread = {name: [0.8 * t, 1.1 * t] for name, t in SLOWER["seconds"].items()}  # of 30 %, and n is 1.5 times that
    assert files([timed(CPU)], [timed(CPU, **SLOWER, spread=spread)]) == 0
    quiet = {name: [t, t] for name, t in SLOWER["seconds"].items()}
    seconds = {**SLOWER["seconds"], "ours": 2.05e-3}
    assert files([timed(CPU, spread=quiet)], [timed(CPU, seconds=seconds, spread=quiet)]) == 0
    assert capsys.readouterr().out.count("0 slower, 0 faster, 0 unclear, 1 same") == 2


def test_three_percent_of_quiet_times_are_noise_and_four_are_not(files):
    def row(ours):
        seconds = {"ours": ours, "published": 4e-3}
        return timed(CPU, seconds=seconds, spread={name: [t, t] for name, t in seconds.items()})

    assert files([row(2e-3)], [row(2.059e-3)]) == 0
    assert files([row(2e-3)], [row(2.08e-3)]) == 1


def test_a_machine_that_was_slower_is_not_ours_that_is(files, capsys):
    def row(machine_factor, ours_factor=1.0):
        seconds = {"ours": 2e-3 * machine_factor * ours_factor, "published": 4e-3 * machine_factor}
        return timed(CPU, seconds=seconds)

    assert files([row(1)], [row(1.3)]) == 0
    assert "1 unclear" in capsys.readouterr().out
    assert files([row(1)], [row(1.3, 1.3)]) == 1
    assert files([row(1)], [row(0.7, 1 / 0.7)]) == 0  # ours takes as long as before while all others got faster
    assert "0 slower, 0 faster, 1 unclear" in capsys.readouterr().out


def test_alone_a_row_has_but_its_own_change(files):
    def row(ours):
        return timed(CPU, seconds={"ours": ours})

    assert files([row(2e-3)], [row(3e-3)]) == 1


def test_different_machines_are_never_compared(files, capsys):
    assert files([timed(CPU)], [timed(GPU, **SLOWER)]) == 2
    said = capsys.readouterr()
    assert f"{CPU['device']}: only in A; figures of different machines are never compared" in said.out
    assert f"{GPU['device']}, capability 9.0: only in B; figures of different machines are never compared" in said.out
    assert "nothing to compare" in said.err
    assert files([timed(CPU), timed(GPU)], [timed(GPU, **SLOWER)]) == 1
    said = capsys.readouterr().out
    assert "only in A; figures" in said
    assert CPU["device"] not in said.split("are never compared")[1]


def test_rows_only_in_one_are_named(files, capsys):
    other = timed(CPU, label="another")
    assert files([timed(CPU), other], [timed(CPU), timed(CPU, label="a third")]) == 0
    said = capsys.readouterr().out
    assert "a.jsonl: region_pool stage another forward+backward float32" in said
    assert "b.jsonl: region_pool stage a third forward+backward float32" in said


def test_rows_without_a_passed_check_are_not_compared(files, capsys):
    assert files([timed(CPU)], [timed(CPU, **SLOWER, errors={"ours": 1.0, "published": 0, "compiled": 0})]) == 2
    assert "b.jsonl: left out: 1 row of b.jsonl: its check was not passed" in capsys.readouterr().out


def test_on_a_gpu_the_wall_clock_counts_as_well(files, capsys):
    wall = {"ours": 3e-3, "published": 4e-3, "compiled": 3e-3}
    before = {**wall, "ours": 2e-3}
    assert files([timed(GPU, wall_seconds=before)], [timed(GPU, wall_seconds=wall)]) == 1
    assert "[wall]: 2.00 -> 3.00 ms" in capsys.readouterr().out
    assert files([timed(CPU, wall_seconds=before)], [timed(CPU, wall_seconds=wall)]) == 0


def test_the_hosts_time_of_a_launch_is_compared(files, capsys):
    assert files([overhead(CPU)], [overhead(CPU, seconds=4e-5)]) == 1
    assert "[host]" in capsys.readouterr().out


def test_what_the_machine_did_is_said(files, capsys):
    after = [timed(CPU, torch="2.14.0", commit="def5678"), device(CPU, rate=2e10, torch="2.14.0")]
    assert files([timed(CPU), device(CPU)], after) == 0
    said = capsys.readouterr().out
    assert "torch 2.13.0, commit abc1234, copy large uint8 30 G/s -> torch 2.13.0" not in said
    assert "torch 2.13.0, commit abc1234, copy large uint8 30 G/s -> torch 2.14.0, " in said
    assert "copy large uint8 20 G/s" in said


def test_folders_are_compared_by_their_newest_rows(tmp_path, capsys):
    newer = timed(CPU, **SLOWER, date="2026-11-21T10:00:00+00:00")
    write(tmp_path / "a" / "one.jsonl", [timed(CPU)])
    write(tmp_path / "b" / "one.jsonl", [newer])
    write(tmp_path / "b" / "two.jsonl", [timed(CPU)])
    assert compare.main(tmp_path / "a", tmp_path / "b") == 1
    assert compare.main(tmp_path / "a", tmp_path / "missing") == 2
    assert "missing is neither a file of rows nor a folder" in capsys.readouterr().err


# --- the rule -------------------------------------------------------------------------------------------------------


def normal(draw, _):
    return 1 + 0.1 * draw.gauss(0, 1)


def skewed(draw, _):
    return 1 + 0.1 * draw.expovariate(1)


def spiked(draw, _):
    return 1 + 0.02 * draw.gauss(0, 1) + (draw.expovariate(2) if draw.random() < 0.2 else 0)


def two_modes(draw, _):
    return 1 + 0.01 * draw.gauss(0, 1) + (0.1 if draw.random() < 0.5 else 0)


def in_bursts(draw, former):
    """Neighbours correlate by 0.7."""
    before = draw.gauss(0, 1) if former is None else (former - 1) / 0.1
    return 1 + 0.1 * (0.7 * before + math.sqrt(1 - 0.7**2) * draw.gauss(0, 1))


def flagged(distribution, repeats, pairs=2000, factor=1.0):
    """Which share of pairs of rows of the same distribution the rule calls a change."""
    draw = random.Random(f"{distribution.__name__} {repeats}")

    def row(scale):
        times = [distribution(draw, None)]
        while len(times) < repeats:
            times.append(distribution(draw, times[-1]))
        low, median, high = (scale * t for t in statistics.quantiles(times, n=4, method="inclusive"))
        return {"seconds": {"ours": median}, "spread": {"ours": [low, high]}, "repeats": repeats}

    return sum(compare.change(row(1), row(factor), "ours").sign != 0 for _ in range(pairs)) / pairs


@pytest.mark.parametrize("distribution", [normal, skewed, spiked, two_modes])
@pytest.mark.parametrize(("repeats", "most"), [(7, 0.01), (24, 0.001)])
def test_equal_distributions_are_hardly_ever_called_a_change(distribution, repeats, most):
    assert flagged(distribution, repeats) <= most


def test_nor_where_samples_come_in_bursts():
    assert flagged(in_bursts, 7) <= 0.02
    assert flagged(in_bursts, 24) <= 0.005


def test_a_change_that_matters_is_seen():
    assert flagged(normal, 24, pairs=300, factor=1.5) >= 0.99
    assert flagged(two_modes, 24, pairs=300, factor=1.5) >= 0.99


def test_few_samples_make_more_noise():
    def row(repeats):
        return {"seconds": {"ours": 1.0}, "spread": {"ours": [0.9, 1.0]}, "repeats": repeats}

    noise = [compare.change(row(r), row(r), "ours").noise for r in (5, 24, 1000)]
    assert noise == sorted(noise, reverse=True)
    assert noise[1] == pytest.approx(1.5 * math.hypot(0.1, 0.1))
    assert compare.change(row(1000), row(5), "ours").noise == noise[0]


def test_cases_come_from_rows_that_may_enter(tmp_path):
    before = read(write(tmp_path / "a.jsonl", [timed(CPU)]))
    (case,) = compare.cases(before, before)
    assert (case.clock, case.verdict, case.before) == ("device", "same", 2e-3)

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from peagle.bench.client import Answer, Counters, parse_counters
from peagle.bench.plots import draw, throughput
from peagle.bench.report import (
    Conditions,
    Measurement,
    NamedDrafter,
    bench_rows,
    best_k,
    format_bench,
    format_best,
)

METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="target"} 22.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="target"} 1.795e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="target"} 66.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="target"} 17.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="1"} 6.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="2"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",position="2"} 1.795e+09
vllm:generation_tokens_total{engine="0",model_name="target"} 39.0
"""


def test_counters_are_read_from_the_engines_metrics():
    assert parse_counters(METRICS) == Counters(22, 17, [9, 6, 2])


def test_counters_of_several_engines_add_up():
    twice = METRICS + METRICS.replace('engine="0"', 'engine="1"')
    assert parse_counters(twice) == Counters(44, 34, [18, 12, 4])


def test_an_engine_without_drafter_has_no_counters():
    assert parse_counters('vllm:generation_tokens_total{engine="0"} 39.0\n') == Counters(0, 0, [])


def test_a_run_counts_only_what_came_since_its_start():
    assert Counters(30, 20, [12, 8]).since(Counters(10, 5, [3, 2])) == Counters(20, 15, [9, 6])
    assert Counters(30, 20, [12, 8]).since(Counters(0, 0, [])) == Counters(30, 20, [12, 8])


OURS = NamedDrafter("/runs/a/drafter", "p-eagle")
BASELINE = NamedDrafter("/runs/b/drafter", "eagle3")


def measurement(
    k, concurrency, seconds, tokens=((1, 2, 3), (4, 5)), prompt_set="code", drafter=OURS
):
    """Two prompts asked twice; the four answers took 1, 2, 3 and 4 seconds."""
    answers = [
        Answer(list(ids), seconds=float(i + 1), first_token_seconds=0.1 * (i + 1))
        for i, ids in enumerate([*tokens, *tokens])
    ]
    counters = Counters(10, 12, [8, 3, 1][:k]) if k else Counters(0, 0, [])
    drafter = drafter if k else None
    return Measurement(prompt_set, drafter, k, concurrency, 2, answers, seconds, counters)


CONDITIONS = Conditions("vLLM 0.32.0 (cpu)", "Some CPU, 2 cores", "float32", 0.0)


def test_a_row_states_speed_latency_and_acceptance_beside_no_drafter():
    alone, drafted = bench_rows([measurement(0, 1, 5.0), measurement(3, 1, 2.0)], CONDITIONS)
    assert alone["method"] is None and drafted["method"] == "p-eagle"
    assert alone["k"] is alone["drafter"] is alone["speedup"] is alone["acceptance_length"] is None
    assert alone["tokens_per_second"] == drafted["baseline_tokens_per_second"] == 2.0
    assert drafted["tokens_per_second"] == 5.0 and drafted["speedup"] == 2.5
    assert drafted["acceptance_length"] == pytest.approx(2.2)
    assert drafted["per_position"] == pytest.approx([0.8, 0.3, 0.1])
    assert drafted["latency_p50_s"] == 2.5
    assert drafted["latency_p95_s"] == pytest.approx(3.85)
    assert drafted["latency_p99_s"] == pytest.approx(3.97)
    assert drafted["ttft_p50_s"] == pytest.approx(0.25)
    assert (drafted["prompts"], drafted["requests"], drafted["tokens"]) == (2, 4, 10)
    assert drafted["drafter"] == "/runs/a/drafter" and drafted["engine"] == "vLLM 0.32.0 (cpu)"
    assert json.loads(json.dumps([alone, drafted])) == [alone, drafted]


def test_outputs_are_compared_prompt_by_prompt_when_greedy():
    other = measurement(3, 1, 2.0, tokens=((1, 2, 3), (4, 6)))
    _, drafted = bench_rows([measurement(0, 1, 5.0), other], CONDITIONS)
    assert drafted["lossless_prompts"] == 1
    _, sampled = bench_rows([measurement(0, 1, 5.0), other], CONDITIONS._replace(temperature=0.7))
    assert sampled["lossless_prompts"] is None


RUNS = [
    measurement(0, 1, 4.0), measurement(0, 4, 1.0),
    measurement(3, 1, 3.0), measurement(3, 4, 1.25),
    measurement(2, 1, 2.0), measurement(2, 4, 2.0),
]  # fmt: skip


def test_the_best_k_may_be_none_where_the_machine_is_full():
    rows = bench_rows(RUNS, CONDITIONS)
    assert [(row["concurrency"], row["k"]) for row in best_k(rows)] == [(1, 2), (4, None)]
    assert format_best(rows).splitlines() == [
        "best for code with 1 at once: p-eagle, K = 2 (5.0 tok/s)",
        "best for code with 4 at once: no drafter (10.0 tok/s)",
    ]


def test_the_table_has_a_line_for_each_row_in_the_order_of_concurrency_and_k():
    lines = format_bench(bench_rows(RUNS, CONDITIONS)).splitlines()
    found = [line.split()[2:5] for line in lines if line.startswith("code")]
    assert [line[:2] for line in found[::3]] == [["1", "none"], ["4", "none"]]
    assert found[1:3] == [["1", "p-eagle", "2"], ["1", "p-eagle", "3"]]
    assert found[4:6] == [["4", "p-eagle", "2"], ["4", "p-eagle", "3"]]
    assert "0.80 0.30 0.10" in lines[-1] and "2.50 / 3.85 / 3.97 s" in lines[-1]


def test_a_baseline_stands_beside_none_and_ours_and_may_be_the_best():
    beside = [measurement(k, 1, s, drafter=BASELINE) for k, s in ((2, 1.0), (3, 4.0))]
    rows = bench_rows([*RUNS, *beside], CONDITIONS)
    found = [(row["method"], row["k"], row["drafter"]) for row in rows if row["concurrency"] == 1]
    assert found == [
        (None, None, None),
        *(("p-eagle", k, "/runs/a/drafter") for k in (2, 3)),
        *(("eagle3", k, "/runs/b/drafter") for k in (2, 3)),
    ]
    assert {row["baseline_tokens_per_second"] for row in rows if row["concurrency"] == 1} == {2.5}
    assert format_best(rows).startswith("best for code with 1 at once: eagle3, K = 2 (10.0 tok/s)")


def test_speed_at_one_load_is_drawn_over_k():
    axes = Figure().subplots()
    rows = [row for row in bench_rows(RUNS, CONDITIONS) if row["concurrency"] == 1]
    throughput(axes, rows)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["no drafter", "2", "3"]
    (line,) = axes.lines
    speeds = {row["k"] or 0: row["tokens_per_second"] for row in rows}
    assert dict(zip(*line.get_data(), strict=True)) == speeds


def test_both_plots_are_drawn(tmp_path):
    paths = draw(bench_rows(RUNS, CONDITIONS), tmp_path)
    assert [path.name for path in paths] == ["bench_throughput.png", "bench_acceptance.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 800
            assert len(image.convert("RGB").getcolors(10**6)) > 20

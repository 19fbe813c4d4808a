"""The measured tables: each number on the card is the one in the metrics file."""

import math
import re

import pytest
from card_runs import (
    ACCEPTANCE,
    BENCH,
    VALIDATE,
    acceptance_row,
    card,
    embedded_run,
    folder_run,
    full_run,
    make_run,
    section,
    tables_in,
)
from huggingface_hub import ModelCard

from peagle.card.card import write_card


def numbers_in(cell):
    return re.findall(r"-?\d[\d,]*(?:\.\d+)?", cell)


def assert_shows(cell, *values):
    """The cell's numbers are exactly ``values``, each right to its last printed digit."""
    shown = numbers_in(cell)
    assert len(shown) == len(values), cell
    for figure, value in zip(shown, values, strict=True):
        decimals = len(figure.partition(".")[2])
        assert decimals >= (0 if isinstance(value, int) else 1)
        assert abs(float(figure.replace(",", "")) - value) <= 0.5001 * 10**-decimals


def test_the_acceptance_table_holds_the_numbers_of_acceptance_json():
    text = section(card(full_run), "Measured acceptance")
    greedy, sampled = tables_in(text)
    captions = re.findall(r"^\*Engine (.*)\*$", text, flags=re.M)
    hardware = "hardware: EPYC 9R14, 16 cores · NVIDIA H200"
    assert captions == [
        f"vllm 0.32.0 · bfloat16 · temperature 0 (greedy) · {hardware}",
        f"vllm 0.32.0 · bfloat16 · temperature 0.7 · {hardware}",
    ]
    assert len(greedy + sampled) == len(ACCEPTANCE["rows"])
    for shown, row in zip(greedy + sampled, ACCEPTANCE["rows"], strict=True):
        assert (shown["Prompt set"], shown["K"]) == (row["prompt_set"], str(row["k"]))
        assert_shows(shown["Acceptance length"], row["acceptance_length"])
        assert_shows(shown["95% interval"], *row["acceptance_length_ci95"])
        assert_shows(shown["Prompts"], row["prompts"])
        assert_shows(shown["Tokens"], row["tokens"])
        assert_shows(shown["Tokens/s"], row["tokens_per_second"])
        assert_shows(shown["Tokens/s without drafter"], row["baseline_tokens_per_second"])
    assert all(row["Identical to target"] == "79\u00a0of\u00a080" for row in greedy)
    assert sampled[0]["Identical to target"] == "sampled"


def test_the_per_position_table_holds_the_numbers_of_acceptance_json():
    greedy, sampled = tables_in(section(card(full_run), "Acceptance per position"))
    shown = greedy + sampled
    assert len(shown) == len(ACCEPTANCE["rows"])
    for line, row in zip(shown, ACCEPTANCE["rows"], strict=True):
        for position in range(1, 6):
            if position <= row["k"]:
                assert_shows(line[str(position)], row["per_position"][position - 1])
            else:
                assert line[str(position)] == "-"


def test_the_throughput_table_holds_the_numbers_of_bench_json():
    text = section(card(full_run), "Throughput and latency")
    assert "hardware: Grace, 72 cores · NVIDIA B200" in text  # the bench's machine, not the run's
    (shown,) = tables_in(text)
    assert len(shown) == len(BENCH["rows"])
    columns = {
        "Requests": "concurrency", "Tokens/s": "tokens_per_second", "Latency p50": "latency_p50_s",
        "p95": "latency_p95_s", "p99": "latency_p99_s", "First token p50": "ttft_p50_s",
    }  # fmt: skip
    for line, row in zip(shown, BENCH["rows"], strict=True):
        for column, key in columns.items():
            assert_shows(line[column], row[key])
        if row["drafter"] is None:
            alone = (line["Drafter"], line["K"], line["Speed-up"], line["Acceptance length"])
            assert alone == ("none", "-", "-", "-")
        else:
            assert (line["Drafter"], line["K"]) == ("drafter", "5")
            assert_shows(line["Speed-up"], row["speedup"])
            assert_shows(line["Acceptance length"], row["acceptance_length"])


def test_teacher_forced_accuracy_stands_under_its_own_name():
    text = section(card(embedded_run), "Teacher-forced per-depth accuracy")
    assert "This is **not** acceptance" in text
    (shown,) = tables_in(text)
    for line, row in zip(shown, VALIDATE["rows"], strict=True):
        assert line["Depth"] == str(row["depth"])
        assert_shows(line["Accuracy"], row["accuracy"])
        assert_shows(line["Accuracy if all before are right"], row["conditional_accuracy"])
        assert_shows(line["Rows"], row["count"])
    estimate, loss = re.findall(r"(?:text|loss): (\S+)\.$", text, flags=re.M)
    assert_shows(estimate, 2.718281)
    assert_shows(loss, 1.414213)


def test_a_cell_that_was_not_measured_says_so():
    ((shown,),) = tables_in(section(card(folder_run), "Measured acceptance"))
    assert_shows(shown["Acceptance length"], 1.9876)
    unmeasured = {column for column, cell in shown.items() if cell == "not measured"}
    assert unmeasured == {"95% interval", "Tokens/s", "Identical to target"}


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "3.4", True])
def test_only_a_finite_number_counts_as_measured(value, tmp_path):
    run = make_run(tmp_path, acceptance={"rows": [acceptance_row("code", 5, 2.0) |
                                                  {"acceptance_length": value}]})  # fmt: skip
    write_card(run, run / "drafter", run / "card")
    page = (run / "card/README.md").read_text()
    ((shown,),) = tables_in(section(page, "Measured acceptance"))
    assert shown["Acceptance length"] == "not measured"
    assert "model-index" not in ModelCard(page).data.to_dict()
    assert not (run / "card/acceptance_over_k.png").exists()

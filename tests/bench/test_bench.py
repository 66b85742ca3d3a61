"""`scd bench`: rows, limits, memory, comparisons, and what it refuses."""

import json
import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro

from scd.autoencoders.config import WanAutoencoderConfig
from scd.autoencoders.wan import WanAutoencoder
from scd.bench.card import Limits, LimitsOfDevice, RowFile, measure_limits
from scd.bench.case import Case, numbers, parse_case
from scd.bench.compare import CompareConfig, compare, pairs_of
from scd.bench.measure import BenchConfig, bench, cases_of
from scd.bench.models import Subject, find_subject, random_model
from scd.bench.streams import TimedSessions, TimedStreams
from scd.bench.timing import Effort, time_case
from scd.cli import main
from scd.common import memory as device_memory
from scd.common.memory import OutOfMemory, PeakMemory, check_free, out_of_memory_named
from scd.data.source import DataCard
from scd.models.build import build, frame_cost, num_parameters
from scd.models.checkpoint import World, save_world
from scd.models.config import SamplingConfig
from scd.models.cost import Load
from tests.tiny_wan import tiny_wan, tiny_wan_separable
from tests.tiny_wan_vae import tiny_vae

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "model engine join context steps batch sessions precision device seconds_per_frame_median "
    "p90_s p99_s encoder_s decoder_step_s autoencoder_s frames_per_s_denoise "
    "frames_per_s_end_to_end first_frame_s peak_memory_bytes flops_per_frame bytes_per_frame "
    "resident_memory_bytes "
    "fraction_of_limit commit jitter_s cold_start_s guidance limits hardware versions timed note "
    "memory_needed_bytes latency_p50_s latency_p99_s"
).split()


pytestmark = pytest.mark.usefixtures("brief_bench")


def test_a_row_says_all_that_scripts_rely_on(tmp_path, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    config = BenchConfig(
        model="toy,toy-dense", steps="1,2", engine="plain", json=str(out), frames=4, device="cpu"
    )
    rows = bench(config)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert [(row["model"], row["steps"]) for row in rows] == [
        ("toy", 1), ("toy", 2), ("toy-dense", 1), ("toy-dense", 2)
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith("hardware  ") and "GFLOP/s of matrix products" in printed
    for row in rows:
        assert set(NAMES) <= set(row)
        assert row["context"] == 16 and row["frames"] == 4 and row["sessions"] == 1
        assert row["join"] == (None if row["model"] == "toy-dense" else "prefix")
        assert 0 < row["seconds_per_frame_median"] <= row["p90_s"] <= row["p99_s"]
        parts = row["encoder_s"] + row["steps"] * row["decoder_step_s"] + row["autoencoder_s"]
        assert parts == pytest.approx(row["seconds_per_frame_median"], rel=0.5)
        assert row["frames_per_s_denoise"] >= row["frames_per_s_end_to_end"]
        assert 0 < row["fraction_of_limit"]
        assert row["first_frame_s"] > 0 and row["cold_start_s"] >= 0
        assert f'"model": "{row["model"]}", "engine": "plain"' in printed
    assert rows[1]["flops_per_frame"] > rows[0]["flops_per_frame"]


@pytest.mark.parametrize(("model", "engine"), [("toy", "fast"), ("toy-dense", "plain")])
def test_sessions_are_timed(model, engine):
    config = BenchConfig(
        model=model,
        steps="2",
        sessions="1,3",
        engine=engine,
        context="6",
        guidance="conditions",
        frames=2,
        device="cpu",
    )
    rows = bench(config)
    assert [(row["sessions"], row["frames"]) for row in rows] == [(1, 2), (3, 6)]
    for row in rows:
        assert set(NAMES) <= set(row) and row["batch"] == 1
        assert 0 < row["latency_p50_s"] <= row["latency_p99_s"]
        assert 0 < row["frames_per_s_end_to_end"] <= row["frames_per_s_denoise"]
        assert row["encoder_s"] > 0 and row["decoder_step_s"] > 0 and row["autoencoder_s"] > 0


def test_sessions_start_apart():
    sessions = TimedSessions(Case(model="toy", context=4, steps=4, sessions=4, engine="fast"), CPU)
    assert sessions.first_frame() > 0 and sessions.streams.sessions == []
    sessions.fill()
    frames = [frame for frame, _ in sessions.streams._denoising.values()]
    assert [frame.num_done for frame in frames] == [3, 2, 1]
    played = sessions.play(8, 60.0, timed_parts=True)
    assert len(played.latencies) == 8
    parts = sum(map(sum, played.parts.values()))
    assert 0.3 * played.seconds < parts <= played.seconds
    assert len(sessions.play(1000, 0.0).latencies) == 4
    assert sessions.first_frame() > 0 and sessions.streams.sessions == []


def test_latents_without_autoencoder_are_played_as_they_are(monkeypatch):
    monkeypatch.setattr(Subject, "has_pixels", False)
    sessions = TimedSessions(Case(model="toy", context=4, steps=1, sessions=2), CPU)
    sessions.fill()
    assert len(sessions.play(2, 60.0).latencies) == 2
    latents = torch.full((1, 1, 5, 4, 4), 2.0)
    assert torch.equal(sessions.world.autoencoder.decode(latents), latents[:, :, :3])


def test_comparisons_are_of_one_session():
    config = CompareConfig(a="model=toy sessions=2", b="model=toy", context="8", steps="1")
    with pytest.raises(ValueError, match="comparisons are of one session"):
        pairs_of(config)


def test_the_fraction_is_of_the_larger_need():
    found = Limits(precision="fp32", matmul_flops_per_s=100.0, copy_bytes_per_s=10.0)
    assert found.seconds(1000, 10) == 10 and found.seconds(100, 50) == 5
    case = Case(model="toy", steps=1, context=4)
    row = time_case(case, CPU, found, Effort(frames=2))
    needed = found.seconds(row["flops_per_frame"], row["bytes_per_frame"])
    assert row["fraction_of_limit"] == pytest.approx(needed * row["frames_per_s_denoise"])
    assert row["frames"] == 2


def test_limits_are_measured():
    for precision in ("fp32", "bf16"):
        found = measure_limits(CPU, precision, 0.05)
        assert 1e8 < found.matmul_flops_per_s < 1e14
        assert 1e8 < found.copy_bytes_per_s < 1e13
    once = LimitsOfDevice(CPU)
    assert once.at("fp32") is once.at("fp32")


@pytest.mark.parametrize(
    "spec",
    [
        "model=toy",
        "model=toy batch=3 guidance=conditions",
        "model=toy guidance=context_noise join=token_concat",
        "model=toy-dense batch=2 guidance=conditions",
        "model=toy precision=bf16 join=channel_concat",
    ],
)
def test_the_window_is_full_and_every_frame_evicts_another(spec):
    case = replace(parse_case(spec, {}), context=5, steps=2)
    streams = TimedStreams(case, CPU)
    streams.fill()
    for index in range(4):
        frame = streams.frame()[:, 0]
        cache = streams.rollout.state.cache
        assert frame.shape == (case.batch, 3, 32, 32) and torch.isfinite(frame).all()
        held = cache.num_frames
        # A separable model's newest frame waits for the next action.
        assert held == 5 and cache.num_evicted == index + 1, (held, cache.num_evicted)
        assert cache.config.window == 5
    assert streams.latents().shape == (case.batch, 3, 32, 32) and cache.num_evicted == 5
    needed = case.cost()
    assert needed.cache_bytes == cache.num_bytes


def test_random_weights_take_their_size_and_no_more():
    config = find_subject("scd-b").config
    peak = PeakMemory(CPU)
    model = random_model(config, CPU, torch.bfloat16)
    needed = frame_cost(config, Load(num_context_frames=1, bytes_per_value=2)).weight_bytes
    assert 2 * num_parameters(model) == needed
    assert needed <= peak.bytes() + 2**20
    # What is beyond it is code that is loaded at first.
    assert peak.bytes() < 1.2 * needed + 150 * 2**20
    assert all(weight.abs().max() > 0 for weight in model.parameters())


def test_the_peak_of_a_run_is_found_although_it_is_gone():
    kept = PeakMemory(CPU)
    held = torch.ones(2**26)
    del held
    # The kernel counts pages in batches.
    assert 2**28 - 2**20 < kept.bytes() < 2**28 + 2**26
    assert PeakMemory(CPU).bytes() < 2**26


@pytest.mark.parametrize("engine, precision", [("plain", "fp32"), ("fast", "bf16")])
def test_engines_hold_weights_and_caches_and_little_more(engine, precision):
    case = Case(model="scd-b", context=16, steps=1, engine=engine, precision=precision)
    TimedStreams(replace(case, model="toy"), CPU)
    row = time_case(
        case,
        CPU,
        Limits(precision=precision, matmul_flops_per_s=1e11, copy_bytes_per_s=1e10),
        Effort(frames=1),
    )
    assert row["memory_needed_bytes"] > 2.5e8
    assert (
        row["memory_needed_bytes"] <= row["peak_memory_bytes"] <= 1.2 * row["memory_needed_bytes"]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["model=toy", "model=toy-dense", "model=scd-b join=prefix"])
@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_a_gpu_is_timed_and_its_tensors_counted(spec, engine):
    device = torch.device("cuda")
    found = measure_limits(device, "bf16", 0.2)
    assert found.matmul_flops_per_s > 1e12 and found.copy_bytes_per_s > 1e11
    case = parse_case(f"{spec} engine={engine} precision=bf16 steps=4", {})
    row = time_case(case, device, found, Effort(frames=5))
    assert row["peak_memory_bytes"] >= row["memory_needed_bytes"]
    assert 0 < row["resident_memory_bytes"] <= row["peak_memory_bytes"]
    assert 0 < row["fraction_of_limit"] < 1
    with pytest.raises(OutOfMemory, match="are free"):
        time_case(replace(case, batch=10**7), device, found, Effort())


def test_what_does_not_fit_is_refused_before_it_runs(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    config = BenchConfig(
        model="toy", context="16", steps="1", batch="1,10000000", engine="plain", frames=2,
        json=str(out), device="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="1 of 2 rows did not fit"):
        bench(config)
    said = capsys.readouterr().err
    assert "batch 10000000 needs" in said and "are free" in said
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["batch"] == 1


def test_a_full_device_is_named_and_the_process_goes_on():
    with pytest.raises(OutOfMemory, match=r"toy ran out of memory on cpu: 3.0 MiB.*are free now"):
        with out_of_memory_named("toy", 3 * 2**20, CPU):
            torch.empty(2**60)
    with pytest.raises(OutOfMemory, match="needs 1024.00 GiB"):
        check_free("a thing", 2**40, CPU)
    with pytest.raises(RuntimeError, match="size"):
        with out_of_memory_named("toy", 1, CPU):
            torch.ones(2) @ torch.ones(3)
    assert torch.ones(2).sum() == 2


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 500\nslab_reclaimable 50\n")
    monkeypatch.setattr(device_memory, "CONTROL_GROUP", tmp_path)
    assert device_memory.free_bytes(CPU) == 2000 + 500 + 50
    (tmp_path / "memory.max").write_text("max\n")
    assert device_memory.free_bytes(CPU) > 2**20


@pytest.mark.parametrize("model_config", ["separable"], indirect=True)
def test_a_trained_world_is_timed_as_it_is(run):
    (row,) = bench(
        BenchConfig(model=run, steps="1", engine="plain", frames=2, device="cpu", context="8")
    )
    assert row["model"] == run and row["autoencoder_s"] > 0 and row["note"] == ""
    with pytest.raises(ValueError, match="was trained with join='token_concat', not 'prefix'"):
        cases_of(BenchConfig(model=run, join="prefix"))


def test_wan_has_its_tokens_and_its_size():
    for name, layers in (("wan-shape", 35), ("wan-shape-dense", 30)):
        subject = find_subject(name)
        assert subject.config.shape.num_tokens == 1560
        with torch.device("meta"):
            model = build(subject.config)
        assert num_parameters(model) == pytest.approx(layers * 18 * 1536**2, rel=0.03)
        assert "no text cross-attention" in subject.note
    cases = cases_of(BenchConfig(model="wan-shape", context="1,5,21", steps="2,4"))
    assert len(cases) == 12


def test_wan_models_have_their_weights_and_any_size():
    for name, weights in (("wan-1.3b", 1_676_874_560), ("wan-1.3b-dense", 1_418_996_800)):
        subject = find_subject(name)
        with torch.device("meta"):
            assert num_parameters(build(subject.config)) == weights
        assert not subject.has_pixels and "latents only" in subject.note
        assert find_subject(f"{name}@64x96").config.shape.shape == (16, 8, 12)
        assert find_subject(name).config.shape.num_tokens == 1560
    cases = cases_of(BenchConfig(model="wan-1.3b,wan-1.3b-dense@64x96", context="1,21", steps="4"))
    assert [case.engine for case in cases] == ["plain", "fast"] * 4
    for size in ("64", "60x96", "0x16"):
        with pytest.raises(ValueError, match="multiples of 16"):
            find_subject(f"wan-1.3b@{size}")


def test_wan_worlds_are_timed(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    models = {"separable": tiny_wan_separable(), "dense": tiny_wan()}
    for name, model in models.items():
        card = DataCard(
            height=32, width=48, fps=16.0, conditions=model.config.conditions, action_names=()
        )
        sampling = SamplingConfig(num_steps=2)
        autoencoder = WanAutoencoder(WanAutoencoderConfig(source=str(tmp_path)))
        world = World(model=model, autoencoder=autoencoder, card=card, sampling=sampling)
        save_world(world, tmp_path / name)
    folders = ",".join(str(tmp_path / name) for name in models)
    rows = bench(BenchConfig(model=folders, guidance="none,conditions", frames=2, device="cpu"))
    assert [row["context"] for row in rows] == [8] * 8
    assert [row["engine"] for row in rows] == ["plain", "fast"] * 4
    plain = rows[::2]
    for row, alone in zip(plain[1::2], plain[::2], strict=True):
        assert row["flops_per_frame"] == 2 * alone["flops_per_frame"]
        assert row["seconds_per_frame_median"] > 0


def test_a_comparison_takes_turns(tmp_path, capsys):
    out = tmp_path / "ratio.json"
    (result,) = compare(
        CompareConfig(
            a="model=toy engine=plain steps=6",
            b="engine=plain model=toy join=token_concat",
            context="8",
            steps="1",
            rounds=3,
            frames=2,
            json=str(out),
            device="cpu",
        )  # fmt: skip
    )
    assert json.loads(out.read_text()) == result
    assert len(result["ratios"]) == 3
    low, middle, high = (result[f"ratio_{name}"] for name in ("low", "a_over_b", "high"))
    assert low == min(result["ratios"]) <= middle <= high == max(result["ratios"])
    assert middle > 1
    assert (result["a"]["join"], result["b"]["join"]) == ("prefix", "token_concat")
    assert (result["a"]["steps"], result["b"]["steps"]) == (6, 1)
    for side in ("a", "b"):
        assert result[side]["seconds_per_frame_median"] > 0
        assert 0 < result[side]["fraction_of_limit"]
    assert "times as long as B" in capsys.readouterr().out


def test_rows_are_kept_when_the_rest_is_interrupted(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    out.write_text('{"older": 1}\n')
    calls = []

    def interrupted(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return time_case(*arguments)

    monkeypatch.setattr("scd.bench.measure.time_case", interrupted)
    words = "bench --steps 1,2 --engine plain --frames 1 --device cpu --append --json".split()
    assert main([*words, str(out)]) == 130
    older, row = (json.loads(line) for line in out.read_text().splitlines())
    assert older == {"older": 1} and row["steps"] == 1


def test_contexts_that_nobody_asked_for_fit():
    cases = cases_of(BenchConfig(model="toy,scd-m", steps="1", engine="plain"))
    assert [(case.model, case.context) for case in cases] == [
        ("toy", 16), ("scd-m", 16), ("scd-m", 64), ("scd-m", 144), ("scd-m", 300)
    ]  # fmt: skip
    both = cases_of(
        BenchConfig(model="toy,toy-dense", steps="1", engine="plain", join="prefix,add")
    )
    assert [case.join for case in both] == ["prefix", "add", None]


def test_a_row_file_is_open_before_it_is_needed(tmp_path):
    with pytest.raises(OSError):
        RowFile(str(tmp_path), append=False)
    RowFile("", append=False).write({"a": 1})


def test_rows_of_another_command_are_not_lost(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    with pytest.raises(FileExistsError, match="rows.jsonl holds other rows: keep them with --app"):
        RowFile(str(path), append=False)
    words = ["--steps", "1", "--frames", "1", "--device", "cpu", "--json", str(path)]
    assert main(["bench", *words]) == 2
    assert path.read_text() == "{}\n"
    RowFile(str(path), append=True).close()


@pytest.mark.parametrize("name", ["bench_cpu.sh", "bench_gpu.sh"])
def test_the_scripts_ask_for_what_there_is(name, tmp_path):
    """Every command of a script, run by a stand-in that only writes down its words."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "scd"
    program.write_text('#!/usr/bin/env bash\nprintf "%q " "$@" >> "$CALLS"; echo >> "$CALLS"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")
    }  # fmt: skip
    out = tmp_path / "out"
    script = ["bash", ROOT / "runs" / name, out]
    subprocess.run(script, env=environment, check=True, timeout=60)
    written = {}
    for line in (tmp_path / "calls").read_text().splitlines():
        command, *words = shlex.split(line)
        assert command == "bench"
        if words[0] == "compare":
            config = tyro.cli(CompareConfig, args=words[1:])
            asked = pairs_of(config)
        else:
            config = tyro.cli(BenchConfig, args=words)
            asked = cases_of(config)
        assert asked and Path(config.json).parent == out
        # Only the first command of a file begins it anew.
        assert config.append == (config.json in written)
        written[config.json] = asked
    assert len(written) >= 5


def test_numbers_are_read_once_each():
    assert numbers("steps", "4, 1,4") == [4, 1]


def test_labels_steer_timed_streams(monkeypatch, tiny_world):
    spec = replace(tiny_world.card.conditions, num_actions=0, num_labels=3)
    subject = find_subject("toy")
    config = replace(subject.config, conditions=spec)
    monkeypatch.setattr(Case, "subject", property(lambda case: replace(subject, config=config)))
    streams = TimedStreams(Case(model="toy", context=4, steps=1, guidance="conditions"), CPU)
    streams.fill()
    assert torch.equal(streams.rollout.labels, torch.zeros(1))
    assert torch.isfinite(streams.frame()).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model nothing", "unknown model 'nothing'; there are toy"),
        ("--model ./nowhere", "there is none at"),
        ("--model ,", "model needs one entry or more"),
        ("--engine warp", "unknown engine 'warp'; there are plain, fast"),
        ("--precision fp4", "unknown precision 'fp4'; there are fp32, bf16"),
        ("--guidance more", "unknown guidance 'more'"),
        ("--join zip", "unknown join 'zip'; there are token_concat"),
        ("--context 17", "context 17 is longer than the window of toy, 16 frames"),
        ("--context 1", "leaves no room beside the first frames"),
        ("--context 0", "context must be whole numbers of 1 or more, got '0'"),
        ("--steps -1", "steps must be whole numbers of 1 or more, got '-1'"),
        ("--batch 2 --sessions 2", "several sessions have one stream each"),
        ("--sessions 0", "sessions must be whole numbers of 1 or more, got '0'"),
        ("--batch many", "batch must be whole numbers of 1 or more, got 'many'"),
        ("--frames 0", "frames must be 1 or more, got 0"),
        ("--seconds 0", "seconds must be above 0"),
        ("--device abacus", "device must be auto"),
        ("--model toy-dense --guidance context_noise", "toy-dense is dense"),
        ("--model scd-b --guidance conditions", "scd-b has none"),
        ("--model toy-dense --join prefix", "join has no effect on toy-dense"),
        ("--json {folder}", "directory"),
        ("--json /proc/nowhere/rows.jsonl", "nowhere"),
        ("go", "takes flags, or compare first; got 'go'"),
        ("compare --a model=toy --b model=toy-dense --frames 0", "frames must be 1 or more"),
        ("compare --a speed=1 --b model=toy", "cannot read 'speed=1'"),
        ("compare --a model=toy --b engine=plain", "names no model"),
        ("compare --a model=toy --b model=no", "unknown model 'no'"),
        ("compare --a model=toy --b model=toy-dense --context 99", "longer than the window"),
        ("compare --a model=toy", "--b"),
    ],
)  # fmt: skip
def test_wrong_words_are_2_and_one_message(line, message, tmp_path, capsys):
    words = [word.format(folder=tmp_path) for word in line.split()]
    try:
        status = main(["bench", *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    errors = capsys.readouterr().err
    assert message in errors.replace("\n", " ") and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []

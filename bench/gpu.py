"""What only a GPU can say, the most valuable first: a JSON line each, to stdout and to --out.

    python bench/gpu.py [--minutes 8] [--only waits,steps] [--side 128] [--rows unet_xl,swinunetr]
    python bench/gpu.py --tiny    # every section, small, on a CPU in CUDA's forms: does it work?

bench/GPU.md says what each figure means, what was predicted, and which switch it decides. A line
is written at once. A section that fails is one line with its error; what --minutes does not reach
is left out. Weights and scans are random.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]
import cost  # noqa: E402

import augment  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import devices  # noqa: E402
import fast_cuda  # noqa: E402
import models  # noqa: E402
import predict  # noqa: E402
import pretrain  # noqa: E402
import swin  # noqa: E402

DEFAULTS = {"channels_last": fast_cuda.CHANNELS_LAST, "shifts": fast_cuda.SHIFTS,
            "sdpa": fast_cuda.SDPA, "benchmark": fast_cuda.CUDNN_BENCHMARK}
OTHERS = {  # what is measured beside them, the most wanted first
    "unet": ({"channels_last": False}, {"benchmark": False}),
    "mednext": ({"shifts": True}, {"channels_last": False}),
    "swin": ({"sdpa": False},),
    "resenc": ({"channels_last": False}, {"benchmark": False}),
}
# Sizes, and what differs between CUDA and --tiny. `swin`: the task in which networks() takes
# SwinUNETR. `compile` on CUDA is as in compile_or_warn.
GPU = {"precision": "bf16", "batch": 2, "full_batch": 8, "runs": 10, "large": 8192, "channels": 64,
       "swin": "segment", "compile": {"options": {"layout_optimization": False}},
       "self_time": "self_device_time_total"}
TINY = {"precision": "fp32", "batch": 1, "full_batch": 1, "runs": 1, "large": 256, "channels": 4,
        "swin": "pretrain", "compile": {"backend": "eager"},  # needs no C++ compiler
        "self_time": "self_cpu_time_total", "side": 32, "rows": "unet_demo,mednext_m,swinunetr"}
# A step is counted in the form that is measured first, the default one.
count = functools.cache(cost.cost)


def switch(**turned):
    """These switches as given, the others as the scripts have them -> all of them."""
    values = DEFAULTS | turned
    fast_cuda.CHANNELS_LAST = values["channels_last"]
    fast_cuda.SHIFTS = values["shifts"]
    fast_cuda.SDPA = values["sdpa"]
    fast_cuda.CUDNN_BENCHMARK = torch.backends.cudnn.benchmark = values["benchmark"]
    return values


def ms(options, function):
    """Milliseconds of one of several runs, between which nobody waits.

    The first, which finds memory and chooses kernels, does not count."""
    if options.runs > 1:
        function()
    devices.synchronize(options.device)
    began = time.perf_counter()
    for _ in range(options.runs):
        function()
    devices.synchronize(options.device)
    return 1e3 * (time.perf_counter() - began) / options.runs


def make_step(options, row, batch, preset="none", compiled=False):
    """A step of the paper's pretraining, and its FLOPs.

    The step is a function -> seconds until the host had the loss."""
    family = models.ROWS[row].family
    name, ratio = ("swin", 0.3) if family == "swin" else ("amaes", 0.6)
    objective = pretrain.choose_objective(
        name, options.device, options.precision, 4, ratio, False, "all")
    side = max(64, options.side) if family in ("swin", "resenc") else options.side
    _, flops, _ = count(row, objective.purpose, batch, side)
    torch.manual_seed(0)
    model = fast_cuda.install(models.build_model(row, objective.purpose).to(options.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, amsgrad=True, fused=True)
    network = torch.compile(model, **options.compile) if compiled else model

    # A batch as the loader hands it over.
    draws = [augment.draw(seed, preset, side) for seed in range(batch)]
    crops = [torch.rand(1, *draw.context).half().pin_memory() for draw in draws]
    loaded = data.Batch(crops, None, draws, list(range(batch)), ["random"] * batch, "")

    def step():
        began = time.perf_counter()
        loss, _ = objective.loss(network, loaded, logging=False)
        forward = time.perf_counter() - began
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return forward

    return step, flops


def machine(options):
    """The card, and the most that it does: a large matrix product in bf16, a copy."""
    a, b = torch.randn(2, options.large, options.large, device=options.device).bfloat16()
    copied = a.repeat(16, 1)
    yield "machine", checkpoint.versions() | {
        "card": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version(),
        "cores": os.cpu_count(), "dense_tflops": 2 * len(a) ** 3 / ms(options, lambda: a @ b) / 1e9,
        "copy_tb_s": 2 * copied.nbytes / ms(options, copied.clone) / 1e9}


def waits(options):
    """The host's seconds for a step behind two seconds of other work.

    And where torch says that it waits."""
    first, last = options.rows[0], options.rows[-1]
    cases = (first, "none", 2), (first, "all", 6), (last, "none", options.batch)
    for row, preset, batch in cases:
        step, _ = make_step(options, row, batch, preset)
        for _ in range(min(2, options.runs)):  # finds memory, chooses kernels
            step()
        devices.synchronize(options.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda._sleep(int(3.5e9))  # clock cycles
            torch.cuda.set_sync_debug_mode("warn")
            began = time.perf_counter()
            forward = step()
            host = time.perf_counter() - began
            torch.cuda.set_sync_debug_mode("default")
        devices.synchronize(options.device)
        whole = time.perf_counter() - began
        caught = [warning for warning in caught if "synchroniz" in str(warning.message)]
        places = sorted({f"{os.path.basename(w.filename)}:{w.lineno}" for w in caught})
        yield f"{row}, augment {preset}", {
            "forward_s": forward, "host_s": host, "whole_s": whole, "synchronises": places}


def distance(a, b):
    """Between tensors, relative to the second."""
    a, b = (tensor.detach().double().cpu() for tensor in (a, b))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def augmentations(options):
    """Table 5 but noise: the largest distance of a transform on the device from the CPU's.

    And the milliseconds of all."""
    worst = {"labels": 0.0}
    for seed in range(60):
        draw = augment.draw(seed, "all", options.side // 2)
        crop, label = torch.rand(1, *draw.context), (torch.rand(draw.context) * 4).byte()
        x, labels = augment.spatial([crop.to(options.device)], [label.to(options.device)], [draw])
        expected, expected_labels = augment.spatial([crop], [label], [draw])
        changed = (labels.cpu() != expected_labels).float().mean().item()
        worst["labels"] = max(worst["labels"], changed)
        found = {"spatial": distance(x, expected)}
        for name, parameters in draw.intensity:
            if not name.endswith("noise"):
                transform = augment.TRANSFORMS[name]
                on_cpu = transform(x[0].cpu(), *parameters)
                found[name] = distance(transform(x[0], *parameters), on_cpu)
        worst |= {name: max(worst.get(name, 0.0), value) for name, value in found.items()}
    yield "device against CPU", worst

    draws = [augment.draw(seed, "all", options.side) for seed in range(48)]
    crops = [torch.rand(1, *draw.context, device=options.device).half() for draw in draws]
    took = ms(options, lambda: augment.intensity(augment.spatial(crops, None, draws)[0], draws))
    yield "Table 5", {"ms_a_sample": took / len(draws)}


def outcome(model, x, target, half):
    """Output of a network, and the gradients of its matrices and kernels, by name."""
    model.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        output = model(x)
    ((output.float() - target) ** 2).mean().backward()
    gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters()
                 if weight.dim() > 1}
    return gradients | {"output": output.detach().cpu()}


def networks(options):
    """CUDA's form in float32 on the device against the CPU.

    In bf16, under each switch, against float32."""
    for row, task in (("unet_b", "pretrain"), ("mednext_l_mednextdec", "segment"),
                      ("swinunetr", options.swin)):
        others = OTHERS[models.ROWS[row].family]
        torch.manual_seed(0)
        model = fast_cuda.install(models.build_model(row, task))
        x, target = torch.rand(2, options.batch, 1, *[2 * model.size_multiple] * 3)
        expected = outcome(model, x, target, half=False)
        model, x, target = (thing.to(options.device) for thing in (model, x, target))
        switches = ({}, *others)
        cases = [("fp32", {}), *((options.precision, turned) for turned in switches)]
        for precision, turned in cases:
            switch(**turned)
            found = outcome(model, x, target, precision == "bf16")
            apart = {name: distance(found[name], expected[name]) for name in expected}
            output, worst = apart.pop("output"), max(apart, key=apart.get)
            yield f"{row}, {precision}", turned | {
                "output": output, "gradient": apart[worst], "of": worst}
            expected = found if precision == "fp32" else expected


def measure(options, row, batch, preset="none", compiled=False, **turned):
    """A step of pretraining with these switches turned: a line.

    And one of the kernels that took most."""
    torch._dynamo.reset()  # or it recompiles for any batch after two
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    switches, began = switch(**turned), time.perf_counter()
    step, flops = make_step(options, row, batch, preset, compiled)
    step()  # compiles, chooses kernels
    devices.synchronize(options.device)
    first, took = time.perf_counter() - began, ms(options, step)
    gib = [torch.cuda.max_memory_allocated() / 2 ** 30, torch.cuda.max_memory_reserved() / 2 ** 30]
    name = f"{row}, compiled" if compiled else row
    yield name, switches | {"batch": batch, "augment": preset, "ms": took,
                            "tflops": flops / took / 1e9, "gib": gib, "first_s": first}
    with torch.profiler.profile() as profile:
        step()
        devices.synchronize(options.device)
    events = [event for event in profile.key_averages() if not event.is_user_annotation]
    events = [event for event in events if event.device_type.name.lower() == options.device.type]
    spent = {event.key[:90]: getattr(event, options.self_time) / 1e3 for event in events}
    dearest = sorted(spent, key=spent.get, reverse=True)[:8]
    yield f"{name}, kernels", {
        "ms": sum(spent.values()), "dearest_ms": {key: spent[key] for key in dearest}}


def steps(options):
    """Figure 1, uncompiled: as the scripts are, then with each switch turned, then with Table 5."""
    for row in options.rows:
        yield from measure(options, row, options.batch)
    for row in options.rows:
        for turned in OTHERS[models.ROWS[row].family]:
            yield from measure(options, row, options.batch, **turned)
    yield from measure(options, options.rows[0], options.batch, preset="all")


def compiled(options):
    """What the scripts compile, all but SwinUNETR; then with the most wanted switch turned."""
    for row in options.rows:
        family = models.ROWS[row].family
        for turned in ({}, OTHERS[family][0]) if family != "swin" else ():
            batch = options.full_batch if family == "unet" else options.batch
            yield from measure(options, row, batch, compiled=True, **turned)


def run_script(command, losses=None):
    """Run a script as a user does: its exit code, seconds, and the lines that tell something.

    losses: after so many are printed it gets SIGTERM, and the seconds are those after it."""
    telling = ("hours", "continues", "holds step", "arning", ": Dice", "mean ±")
    began, lines = time.perf_counter(), []
    job = subprocess.Popen([sys.executable, "-u", *command.split()], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    timer = threading.Timer(240, job.terminate)  # should it hang
    timer.start()
    for line in job.stdout:
        lines.append(line.rpartition("it/s]")[2].strip())  # what is printed after a progress bar
        if losses and sum("loss " in line for line in lines) == losses:
            began, losses = time.perf_counter(), 0
            job.send_signal(signal.SIGTERM)
    timer.cancel()
    if job.wait() and losses != 0:
        raise RuntimeError(f"{command} ended with {job.returncode}: {' '.join(lines)[-400:]}")
    said = [line for line in lines if any(words in line for words in telling)]
    return {"code": job.returncode, "seconds": time.perf_counter() - began, "said": said[-5:]}


def scripts(options):
    """The scripts on phantoms, with loader, torchrun and NCCL, at the default precision.

    What the paper's pretraining will cost; a signal, and one to its continuation; finetuning,
    evaluation, prediction."""
    device = f"--device {options.device.type}"
    # bf16 on a CPU needs a side of 48.
    side, sized = (48, "--features 4") if options.tiny else (options.side, "")
    loader = f"--patch_size {side} --workers {1 if options.tiny else 4} {device}"
    with tempfile.TemporaryDirectory() as home:
        scan = f"{home}/raw/sub-L000/ses-01/anat/sub-L000_ses-01_FLAIR.nii.gz"
        phantoms = (f"tests/phantom.py --out {home}/raw --subjects 0 --labelled 4 --layout bids "
                    f"--size {side * 5 // 4}")
        prepare = f"prepare_data.py --source bids --input {home}/raw --out {home}/data"
        train = ("-m torch.distributed.run --standalone --nproc_per_node=1 pretrain.py "
                 f"--data {home}/data --out {home}/run --batch_size {options.full_batch} {sized} "
                 f"{loader}")
        # One GPU's share of the paper's run: 100 epochs of 44,308 volumes, 16 a step on two.
        estimate = f"{train} --model {options.rows[0]} --steps 276925 --estimate"
        demo = (f"{train} --model unet_demo --compile false --steps 1000 --val_every 1000 "
                "--log_every 1")
        tuned = (f"finetune.py --task demo --data {home}/data --ckpt {home}/run/last.pt "
                 f"--out {home}/tuned --folds 0 --n_train 3 --steps 4 --compile false {loader}")
        predicted = (f"predict.py --ckpt {home}/tuned/fold_0/last.pt {scan} "
                     f"--out {home}/seg.nii.gz {device} --truth {scan.replace('FLAIR', 'lesion')}")
        for name, losses, command in (
                ("phantoms", None, phantoms),
                ("prepare", None, prepare),
                ("estimate", None, estimate),
                ("signalled", 3, demo),
                ("continued, signalled", 3, demo),
                ("finetune", None, tuned),
                ("predict", None, predicted)):
            yield name, run_script(command, losses)


def layers(options):
    """A 3^3 convolution of 64 channels in bf16, dense and depthwise, in both formats.

    Milliseconds forward, and with backward. Depthwise also as compiled shifts."""
    c, sides = options.channels, [options.side] * 3
    shifts = torch.compile(fast_cuda.depthwise_shifts, **options.compile)
    for name, groups, form, function in (
            ("dense, contiguous", 1, torch.contiguous_format, F.conv3d),
            ("dense, channels-last", 1, torch.channels_last_3d, F.conv3d),
            ("depthwise, contiguous", c, torch.contiguous_format, F.conv3d),
            ("depthwise, channels-last", c, torch.channels_last_3d, F.conv3d),
            ("depthwise, shifts", c, torch.channels_last_3d, shifts)):
        x, weight, bias = (torch.randn(shape, device=options.device).bfloat16() for shape in (
            (2, c, *sides), (c, c // groups, 3, 3, 3), (c,)))
        x = x.to(memory_format=form).requires_grad_()
        weight.requires_grad_()
        run = shifts
        if function is not shifts:
            run = functools.partial(F.conv3d, padding=1, groups=groups)
        forward = functools.partial(run, x, weight, bias)
        yield name, {"forward_ms": ms(options, forward),
                     "both_ms": ms(options, lambda forward=forward: forward().sum().backward())}


def window(options):
    """The sliding window of a network with four classes over a brain, 1 and 4 windows at once."""
    model = models.build_model(options.rows[0], "segment", out_channels=4).to(options.device).eval()
    fast_cuda.install(model)
    volume = torch.rand(1, *(options.side * n // 8 for n in (10, 12, 9))).half()
    half = options.precision == "bf16"
    for batch in (1, 4):
        segment = functools.partial(
            predict.sliding_window, model, volume, options.side, batch=batch)
        with torch.autocast(options.device.type, torch.bfloat16, enabled=half):
            yield f"{batch} at once", {"shape": list(volume.shape), "ms": ms(options, segment)}


SECTIONS = {section.__name__: section for section in (
    machine, waits, augmentations, networks, steps, compiled, scripts, layers, window)}


@contextlib.contextmanager
def without_gpu():
    """Narrow rows; and nothing takes the place of what a CPU has not."""
    rows = {}
    for name, row in models.ROWS.items():
        width = 16 if row.family == "swin" else 4
        rows[name] = row._replace(features=width, blocks=(1,) * 6, expansion=(2,) * 5)
    missing = ("_sleep", "set_sync_debug_mode", "get_device_name", "reset_peak_memory_stats")
    with (mock.patch.dict(models.ROWS, rows), mock.patch.object(swin, "WINDOW", 4),
          mock.patch.multiple(torch.cuda, **dict.fromkeys(missing, lambda *_: None)),
          mock.patch.object(torch.Tensor, "pin_memory", lambda self: self)):
        yield


def read_options(words):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8,
                        help="what does not begin in them is left out")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections")
    parser.add_argument("--side", type=int, default=128, help="of a patch")
    parser.add_argument("--rows", default="unet_xl,mednext_l,swinunetr",
                        help="networks of models.py")
    parser.add_argument("--out",
                        help="lines are appended; default: bench/GPU.jsonl, no file if tiny")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    options = parser.parse_args(words)
    vars(options).update(TINY if options.tiny else GPU)
    options.only, options.rows = options.only.split(","), options.rows.split(",")
    if unknown := set(options.only) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}: choose of {', '.join(SECTIONS)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.exit(2, "bench/gpu.py needs a GPU; --tiny runs it small, on a CPU\n")
    options.device = devices.pick_device("cpu" if options.tiny else "cuda")
    if not options.out:
        options.out = os.devnull if options.tiny else os.path.join(ROOT, "bench", "GPU.jsonl")
    return options


def main(words=None):
    options = read_options(words)
    began, failed = time.perf_counter(), False

    def say(section, finding, **values):
        head = {"section": section, "finding": finding, "at_s": time.perf_counter() - began}
        text = json.dumps(head | values)
        rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.4g}"))
        for stream in (sys.stdout, file):
            print(json.dumps(rounded), file=stream, flush=True)

    def late():
        return time.perf_counter() - began > 60 * options.minutes

    stand_ins = without_gpu() if options.tiny else contextlib.nullcontext()
    with open(options.out, "a", encoding="utf-8") as file, stand_ins:
        for name in options.only:
            if late():
                say(name, "left out: no time")
                continue
            try:
                switch()
                for finding, values in SECTIONS[name](options):
                    say(name, finding, **values)
                    if late():
                        say(name, "left out: what is left of it")
                        break
            # Whatever it is costs its section; the others still say theirs.
            except Exception as error:
                say(name, "failed", error=f"{type(error).__name__}: {str(error)[:400]}")
                failed = True
    switch()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

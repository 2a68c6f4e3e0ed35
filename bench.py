"""Speed and memory as ratios: each row against an alternative measured in the same run, interleaved, median of several.

    python bench.py step --model base --batch_size 4      # a training step against transformers' VideoMAEForPreTraining
    python bench.py load my_videos/                       # a clip read and cropped, against decord + PIL
    python bench.py eval my_videos/                       # a 5x3-view test, against decoding for each view

What is compared with has to be installed (`pip install transformers`, `pip install decord pillow`); without it a row
has no ratio. Peak memory is that of a process of its own. Times differ from machine to machine and from minute to
minute: read the ratios, on a machine that does nothing else.
"""

import argparse
import multiprocessing
import resource
import sys
import time

import numpy as np
import torch

import data
import masking
from eval import TestVideos, cut, view_indices
from model import (IMAGENET_MEAN, IMAGENET_STD, SIZES, VideoClassifier, VideoMAE, best_dtype,
                   param_groups)


def training_step(name: str, args):
    """-> a function that makes one training step (forward, backward, AdamW) on a fixed batch of 16 x 224^2 clips."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    video = torch.randint(0, 256, (args.batch_size, 16, 224, 224, 3), dtype=torch.uint8).to(device)
    mask = masking.make_mask("tube", args.batch_size, (8, 14, 14), 0.9).to(device)
    extra = ()
    if name == "transformers":
        from transformers import VideoMAEConfig, VideoMAEForPreTraining
        s = SIZES[args.model]
        config = VideoMAEConfig(hidden_size=s["width"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
                                intermediate_size=4 * s["width"], decoder_hidden_size=s["dec_width"],
                                decoder_num_hidden_layers=s["dec_depth"], decoder_num_attention_heads=s["dec_heads"],
                                decoder_intermediate_size=4 * s["dec_width"], use_mean_pooling=False,
                                attn_implementation="sdpa")
        model = VideoMAEForPreTraining(config).to(device)
        pixels = (video / 255 - torch.tensor(IMAGENET_MEAN, device=device)) / torch.tensor(IMAGENET_STD, device=device)
        pixels = pixels.permute(0, 1, 4, 2, 3).contiguous()
        forward, groups = lambda: model(pixels, bool_masked_pos=mask).loss, model.parameters()
    else:
        model = VideoMAE(args.model).to(device)
        if "decoder mask" in name:
            extra = (masking.make_mask("running_cell", args.batch_size, (8, 14, 14), 0.5).to(device), 160, 784)
        forward, groups = lambda: model(video, mask, *(extra or (None, 160)))[0], param_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=best_dtype(device) == "bf16"):
            loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device
    return step


def peak_memory(name: str, args, queue):
    """Runs three steps in this process and reports its peak memory in GB."""
    step = training_step(name, args)
    for _ in range(3):
        step()
    cuda = args.device.startswith("cuda")
    queue.put(torch.cuda.max_memory_allocated() / 2**30 if cuda else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30)


def bench_step(args):
    """Prints time and peak memory of a training step, and both ratios to transformers'."""
    names = ["ours", "ours, decoder mask 0.5"]
    try:
        import transformers
        names.append("transformers")
        print(f"transformers {transformers.__version__}, sdpa attention, eager")
    except ImportError:
        print("transformers is not installed: no ratio")
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, "
          f"{'bf16 autocast' if best_dtype(torch.device(args.device)) == 'bf16' else 'fp32'}, "
          f"ViT-{args.model}, batch {args.batch_size}, 16x224x224, 160 of 1568 tokens visible")
    context, memory = multiprocessing.get_context("spawn"), {}
    for name in names:
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(name, args, queue))
        process.start()
        memory[name] = queue.get()
        process.join()
    steps, times = {name: training_step(name, args) for name in names}, {name: [] for name in names}
    for repeat in range(args.repeats + 2):  # the first two warm up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    median = {name: float(np.median(t[2:])) for name, t in times.items()}
    for name in names:
        row = f"{name:24s} {median[name]:7.3f} s/step   {memory[name]:5.2f} GB"
        if "transformers" in names:
            row += f"   {median['transformers'] / median[name]:5.2f} x as fast"
        print(row)


def usual_clip(path: str, rng):
    """The usual pipeline: decord on one thread, get_batch, PIL crop and resize, to float (T, C, H, W) in [0,1]."""
    import decord
    from PIL import Image
    reader = decord.VideoReader(path, num_threads=1)
    frames = reader.get_batch(list(data.sample_dense(rng, len(reader), 16, 4))).asnumpy()
    y, x, h, w = data.multi_scale_crop(rng, *frames.shape[1:3])
    images = [Image.fromarray(f).crop((x, y, x + w, y + h)).resize((224, 224), Image.BILINEAR) for f in frames]
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 255 for i in images])


def bench_load(args):
    """Prints CPU time per clip of decoding, cropping and resizing, the ratio to decord + PIL, and where it goes."""
    torch.set_num_threads(1)
    paths, _ = data.read_videos(args.source)
    ours = data.PretrainClips(paths, 16, (224, 224), 4)
    ways = {"ours": ours.load}
    try:
        import decord
        import PIL
        ways["decord + PIL"] = lambda i, rng: usual_clip(paths[i], rng)
        print(f"decord {decord.__version__}, PIL {PIL.__version__}")
    except ImportError:
        print("decord or pillow is not installed: no ratio")
    times, worst = {name: [] for name in ways}, 0.0
    for repeat in range(args.repeats):
        for i in range(len(paths)):
            clips = []
            for name, way in ways.items():
                start = time.process_time()
                clips.append(way(i, np.random.default_rng([repeat, i])))
                times[name].append(time.process_time() - start)
            if len(clips) == 2:
                worst = max(worst, (clips[0][0].permute(0, 3, 1, 2).float() - 255 * clips[1]).abs().mean().item())
    for name, t in times.items():
        ratio = f"   {np.mean(times['decord + PIL']) / np.mean(t):5.2f} x" if len(times) == 2 else ""
        print(f"{name:24s} {1000 * np.mean(t):7.1f} ms CPU/clip   {1 / np.mean(t):6.1f} clips/s/core{ratio}")
    if len(times) == 2:
        print(f"largest mean difference of two such clips: {worst:.3f} of 255")
    parts = dict.fromkeys(("open and index", "decode", "to RGB", "crop and resize"), 0.0)
    for i, path in enumerate(paths):
        rng, marks = np.random.default_rng([0, i]), [time.perf_counter()]
        with data.VideoReader(path) as video:
            marks.append(time.perf_counter())
            convert, spent = video.convert, []

            def timed(frame):
                start = time.perf_counter()
                rgb = convert(frame)
                spent.append(time.perf_counter() - start)
                return rgb
            video.convert = timed
            frames = video.frames(data.sample_dense(rng, len(video), 16, 4))
        marks.append(time.perf_counter())
        data.crop_resize(frames, data.multi_scale_crop(rng, *frames.shape[1:3]), 224, 224)
        marks.append(time.perf_counter())
        seconds = [marks[1] - marks[0], marks[2] - marks[1] - sum(spent), sum(spent), marks[3] - marks[2]]
        for part, s in zip(parts, seconds):
            parts[part] += s
    print("ours, ms/clip: " + ", ".join(f"{part} {1000 * s / len(paths):.1f}" for part, s in parts.items()))
    tuning = {name: data.FinetuneClips(paths, [0] * len(paths), rand_aug=(n, 7, 0.5))
              for name, n in (("with RandAugment", 4), ("without", 0))}
    times = {name: [] for name in tuning}
    for repeat in range(args.repeats):
        for i in range(len(paths)):
            for name, clips in tuning.items():
                start = time.process_time()
                clips.load(i, np.random.default_rng([repeat, i]))
                times[name].append(time.process_time() - start)
    print("a fine-tuning clip, ms CPU: " + ", ".join(f"{name} {1000 * np.mean(t):.1f}" for name, t in times.items()))


def bench_eval(args):
    """Prints wall time of testing with 5 clips x 3 crops, one decode per video, against one per view (two ways).

    For each view, one way decodes the frames of its own clip, the other every 4th frame of the whole video, as the
    paper's code does. The views are checked to be the same pixels, the model is the same.
    """
    torch.set_num_threads(1)
    paths, _ = data.read_videos(args.source)
    torch.manual_seed(0)
    device = torch.device(args.device)
    side = args.img_size
    model = VideoClassifier(400, size=args.model, img_size=side).to(device).eval()
    videos = TestVideos(paths, 16, (side, side), num_segments=5)

    def once(i):
        _, frames, index, why = videos[i]
        if why:
            raise ValueError(why)
        return cut(frames, index, (side, side), 3)

    def per_view(i, whole):
        views = []
        for k in range(15):
            with data.VideoReader(paths[i], videos.fit) as video:
                index = view_indices(len(video), 16, 4, "dense", 5)[k // 3]
                if whole:
                    every = np.arange(0, len(video), 4)
                    frames = video.frames(every)[np.searchsorted(every, index)]
                else:
                    frames = video.frames(index)
            views.append(cut(torch.from_numpy(frames), torch.arange(16)[None], (side, side), 3)[k % 3])
        return torch.stack(views)

    @torch.no_grad()
    def forward(views):
        with torch.autocast(device.type, torch.bfloat16, enabled=best_dtype(device) == "bf16"):
            return model(views.to(device)).float().softmax(-1).mean(0).argmax().item()
    ways = {"ours, one decode per video": once, "per view, its clip": lambda i: per_view(i, False),
            "per view, the video": lambda i: per_view(i, True)}
    load, total = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for i in range(len(paths)):
        made = []
        for name, way in ways.items():
            start = time.perf_counter()
            made.append(way(i))
            load[name] += time.perf_counter() - start
            forward(made[-1])
            total[name] += time.perf_counter() - start
        assert all(torch.equal(made[0], views) for views in made[1:])
    print(f"{len(paths)} videos x 5 clips x 3 crops, 16x{side}x{side}, ViT-{args.model} on {args.device}, one thread; "
          "all three give the same pixels")
    for name in ways:
        print(f"{name:28s} loading {load[name] / len(paths):6.3f} s/video   with the model "
              f"{total[name] / len(paths):6.3f}   ours is {load[name] / load['ours, one decode per video']:5.1f} x, "
              f"{total[name] / total['ours, one decode per video']:5.1f} x as fast")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="a pre-training step")
    step.add_argument("--model", default="base", choices=list(SIZES))
    step.add_argument("--batch_size", default=4, type=int, help="clips")
    step.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    load = commands.add_parser("load", help="reading a pre-training clip")
    load.add_argument("source", help="a list file or a folder of videos")
    test = commands.add_parser("eval", help="multi-view testing")
    test.add_argument("source", help="a list file or a folder of videos")
    test.add_argument("--model", default="tiny", choices=list(SIZES))
    test.add_argument("--img_size", default=224, type=int, help="pixels")
    test.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for p in (step, load):
        p.add_argument("--repeats", default=7, type=int, help="measured rounds")
    args = parser.parse_args()
    try:
        {"step": bench_step, "load": bench_load, "eval": bench_eval}[args.command](args)
    except ValueError as e:
        sys.exit(f"bench.py: {e}")


if __name__ == "__main__":
    main()

"""Other libraries on the benchmark's shapes: a server that `experiments.benchmark --peers` starts in a Python that has them.

It imports nothing of this project. Each line of its input is a request in JSON, and each is answered by one line:

    {"op": "prepare", "peer": "torch", "kind": "layer", "dtype": "float32", ...}  ->  {"modes": [...], "versions": {...}, ...}
    {"op": "run", "mode": "training"}                                             ->  {"seconds": 0.1}

or by {"error": what went wrong}, which is "not installed" where the Python lacks the library. The peers are "torch" (a dense
network of equal channels), "torch.compile" (that one compiled, in training steps), "escnn" (R2Conv, regular fields) and "e2cnn"
(R2Diffop, regular fields); the kinds are the functions in KINDS. Each runs on the case's "device", "cpu" or "cuda", in the
faster of torch's two memory layouts, which `prepare` finds with two runs of each. bfloat16 is torch.autocast, or in inference a
model of that type. On a GPU cuDNN may try its algorithms and multiplies float32 as TF32, both as XLA does.
"""

import contextlib
import importlib
import json
import sys
import time
import types

try:
    import torch
except ImportError:
    torch = None


def serve():
    answers, sys.stdout = sys.stdout, sys.stderr  # what the libraries print must not stand among the answers
    run = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "prepare":
                run, answer = prepare(request)
            else:
                answer = {"seconds": run(request["mode"])}
        except ImportError as error:
            answer = {"error": "not installed", "detail": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def prepare(case):
    """(A function that runs a mode once and gives its seconds, the answer): the layout is chosen, everything is warm."""
    names = {"torch", case["peer"].partition(".")[0]}
    versions = {name: importlib.import_module(name).__version__ for name in sorted(names, reverse=True)}
    torch.manual_seed(0)
    on_gpu = case["device"] == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    modules, modes, arrange = KINDS[case["kind"]](case)
    modules.to(case["device"])
    answer = {"modes": list(modes), "versions": versions, "construct_seconds": time.perf_counter() - began}
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    seconds, current = {mode: {} for mode in modes}, None

    def use(layout):
        nonlocal current
        if layout != current:
            modules.to(memory_format=formats[layout])
            modules.zero_grad(set_to_none=True)
            arrange(device=case["device"], memory_format=formats[layout])
            current = layout

    for layout in formats:
        use(layout)
        for mode, function in modes.items():
            function()
            seconds[mode][layout] = min(timed(function, case["device"]) for _ in range(2))
    best = {mode: min(found, key=found.get) for mode, found in seconds.items()}

    def run(mode):
        use(best[mode])
        return timed(modes[mode], case["device"])

    (torch.cuda.reset_peak_memory_stats if on_gpu else forget_peak_memory)()
    for mode in modes:
        run(mode)
    held = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    answer |= {"layout": best, "peak_bytes": held, "threads": torch.get_num_threads()}
    return run, answer | {"parameters": sum(p.numel() for p in modules.parameters())}


def timed(function, device):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def peak_memory():
    """The most host memory in bytes that this process has held, since `forget_peak_memory`; None where the system does not say.

    From Linux's VmHWM: the ru_maxrss of a process starts from that of the process that started it.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next((1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM")), None)


def forget_peak_memory():
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


# Layers of each library, with one interface


def dense(order, bias=False):
    """Plain torch with as many channels as the fields of a group of `order` have."""
    return types.SimpleNamespace(
        image=lambda channels: channels,
        vector=lambda: 2,
        field=lambda features: features * order,
        conv=lambda source, target, size, **options: torch.nn.Conv2d(source, target, size, bias=bias, **options),
        norm=torch.nn.BatchNorm2d,
        relu=lambda field: torch.nn.ReLU(inplace=True),
        dropout=lambda field, rate: torch.nn.Dropout(rate),
        max_pool=lambda field: torch.nn.MaxPool2d(2),
        mean_pool=lambda field: torch.nn.AvgPool2d(2),
        upsample=lambda field: torch.nn.Upsample(scale_factor=2, mode="bilinear"),
        join=lambda x, y: torch.cat([x, y], 1),
        wrap=lambda x, field: x,
        unwrap=lambda y: y,
    )


def regular(library, order, mirrored):
    """Regular fields of escnn, or of e2cnn, whose layers are differential operators up to order 4 (as PDO-eConv's on 5×5)."""
    nn, gspaces = importlib.import_module(f"{library}.nn"), importlib.import_module(f"{library}.gspaces")
    name, turns = ("flipRot2dOnR2", order // 2) if mirrored else ("rot2dOnR2", order)
    space = getattr(gspaces, name if library == "escnn" else name[0].upper() + name[1:])(N=turns)

    def conv(source, target, size, **options):
        if library == "escnn":
            return nn.R2Conv(source, target, size, bias=False, **options)
        return nn.R2Diffop(source, target, size, maximum_order=min(size - 1, 4), bias=False, **options)

    return types.SimpleNamespace(
        image=lambda channels: nn.FieldType(space, channels * [space.trivial_repr]),
        vector=lambda: nn.FieldType(space, [space.irrep(1, 1)]),
        field=lambda features: nn.FieldType(space, features * [space.regular_repr]),
        conv=conv,
        norm=nn.InnerBatchNorm,
        relu=lambda field: nn.ReLU(field, inplace=True),
        dropout=nn.PointwiseDropout,
        max_pool=lambda field: nn.PointwiseMaxPool(field, kernel_size=2),
        mean_pool=lambda field: nn.PointwiseAvgPool(field, kernel_size=2),
        upsample=lambda field: nn.R2Upsampling(field, scale_factor=2),
        join=lambda x, y: nn.tensor_directsum([x, y]),
        wrap=nn.GeometricTensor,
        unwrap=lambda y: y.tensor,
    )


def kit(case):
    return dense(case["order"]) if case["peer"].startswith("torch") else regular(case["peer"], case["order"], case["mirrored"])


# The kinds of cases: each gives the module, a function for each mode, and a function that brings the inputs into a layout


def layer(case):
    """One 5×5 layer between fields of `features` channels: forward, and forward with the gradients of input and weights."""
    make, dtype = kit(case), getattr(torch, case["dtype"])
    field = make.field(case["features"])
    module = make.conv(field, field, 5, padding=2)
    shape = case["batch"], case["features"] * case["order"], case["size"], case["size"]
    data = {"x": torch.randn(shape, dtype=dtype, requires_grad=True), "cotangent": torch.randn(shape, dtype=dtype)}

    def arrange(**place):
        for name, x in data.items():
            data[name] = x.detach().to(**place).requires_grad_(name == "x")

    def apply():
        with autocast(case):
            return make.unwrap(module(make.wrap(data["x"], field)))

    def training():
        module.zero_grad(set_to_none=True)
        data["x"].grad = None
        apply().backward(data["cotangent"])

    return module, {"forward": torch.no_grad()(apply), "training": training}, arrange


def training_step(case):
    """Forward, backward and update of a network, with Adam, "ResNet" with Nesterov's SGD; "UNet" learns a field."""
    module, forward = NETWORKS[case["network"]](kit(case), case)
    forward = torch.compile(forward) if case["peer"] == "torch.compile" else forward
    module.train()
    if case["network"] != "ResNet":
        optimiser = torch.optim.Adam(module.parameters(), lr=1e-4, weight_decay=case["l2"])
    else:
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=case["l2"])
    data = {"images": torch.randn(case["batch"], case["channels"], case["size"], case["size"])}
    labels = torch.arange(case["batch"], device=case["device"]) % 10

    def arrange(**place):
        data["images"] = data["images"].to(**place)
        optimiser.state.clear()  # the moments would keep the layout that the gradients had

    def training():
        optimiser.zero_grad(set_to_none=True)
        with autocast(case):
            logits = forward(data["images"])
        if case["network"] == "UNet":
            difference = logits.float() - data["images"]
            (difference.flatten(1).norm(dim=1) / data["images"].flatten(1).norm(dim=1)).mean().backward()
        else:
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimiser.step()

    return module, {"training": training}, arrange


def inference(case):
    """A dense MnistRotNet whose batch norm is folded into its convolutions, for each size of batch."""
    dtype = getattr(torch, case["dtype"])
    module, forward = mnist_rot_net(dense(case["order"], bias=True), case, folded=True)
    module.to(dtype).eval()
    images = {f"batch {n}": torch.randn(n, case["channels"], case["size"], case["size"], dtype=dtype) for n in case["batches"]}

    def arrange(**place):
        images.update({name: x.to(**place) for name, x in images.items()})

    return module, {name: torch.inference_mode()(lambda name=name: forward(images[name])) for name in images}, arrange


def mnist_rot_net(make, case, folded=False):
    """(module, function): six layers of padding 1, a maximum after the second, and a linear layer over all that is left."""
    field, layers = make.image(case["channels"]), []
    source = field
    for number in range(1, 7):
        target = make.field(case["features"])
        layers += [make.conv(source, target, 5, padding=1)] + ([] if folded else [make.norm(target)]) + [make.relu(target)]
        if number == 2:
            layers.append(make.max_pool(target))
        elif not folded:
            layers.append(make.dropout(target, case["dropout"]))
        source = target
    points = (case["size"] - 4) // 2 - 8
    body = torch.nn.Sequential(*layers)
    head = torch.nn.Linear(points**2 * case["features"] * case["order"], 10, bias=False)
    return torch.nn.ModuleList([body, head]), lambda x: head(make.unwrap(body(make.wrap(x, field))).flatten(1))


def resnet(make, case):
    """(module, function): the pre-activation ResNet of 5×5 layers with strides, pointwise layers in the shortcuts."""
    modules, blocks, image = torch.nn.ModuleList(), [], make.image(case["channels"])

    def add(*layers):
        modules.append(torch.nn.Sequential(*layers))
        return modules[-1]

    def activation(field):
        return make.norm(field), make.relu(field)

    source = make.field(case["widths"][0])
    first = add(make.conv(image, source, 5, padding=2))
    for stage, width in enumerate(case["widths"]):
        for block in range(case["blocks"]):
            target, stride = make.field(width), 2 if stage and not block else 1
            same = source == target and stride == 1
            shortcut = None if same else add(make.conv(source, target, 1, stride=stride))
            two = [make.conv(source, target, 5, padding=2, stride=stride), make.conv(target, target, 5, padding=2)]
            blocks.append((shortcut, add(*activation(source), two[0], *activation(target), two[1])))
            source = target
    last, head = add(*activation(source)), add(torch.nn.Linear(case["widths"][-1] * case["order"], 10))

    def forward(x):
        x = first(make.wrap(x, image))
        for shortcut, body in blocks:
            y = body(x)
            x = (shortcut(x) if shortcut else x) + y
        return head(make.unwrap(last(x)).mean((2, 3)))

    return modules, forward


def unet(make, case):
    """(module, function): the periodic U-Net of regular fields, velocities to velocities, of 3×3 layers and mean pools."""
    modules, vector = torch.nn.ModuleList(), make.vector()
    fields = [make.field(width) for width in case["widths"]]

    def add(*layers):
        modules.append(torch.nn.Sequential(*layers))
        return modules[-1]

    def conv(source, target):
        return make.conv(source, target, 3, padding=1, padding_mode="circular")

    def level(source, target):
        layers = []
        for _ in range(case["blocks"]):
            layers += [conv(source, target), make.norm(target), make.relu(target)]
            source = target
        return add(*layers)

    down = [level(vector, fields[0])]
    down += [add(make.mean_pool(fields[k]), *level(fields[k], fields[k + 1])) for k in range(len(fields) - 1)]
    ups = [(add(make.upsample(fields[k + 1])), level(make.field(case["widths"][k] + case["widths"][k + 1]), fields[k]))
           for k in reversed(range(len(fields) - 1))]
    head = add(conv(fields[0], vector))

    def forward(x):
        x, fine = make.wrap(x, vector), []
        for part in down:
            x = part(x)
            fine.append(x)
        for before, (grow, part) in zip(fine[-2::-1], ups, strict=True):
            x = part(make.join(before, grow(x)))
        return make.unwrap(head(x))

    return modules, forward


def autocast(case):
    return torch.autocast(case["device"], torch.bfloat16, enabled=case["dtype"] == "bfloat16")


KINDS = {"layer": layer, "training step": training_step, "inference": inference}
NETWORKS = {"MnistRotNet": mnist_rot_net, "ResNet": resnet, "UNet": unet}

if __name__ == "__main__":
    serve()

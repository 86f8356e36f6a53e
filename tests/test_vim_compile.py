"""`torch.compile` of the built-in Vim, in a process that has run nothing before."""

import subprocess
import sys

PROGRAM = """
import torch
import svp_peft

model = svp_peft.VisionMamba(
    img_size=16, patch_size=4, stride=4, depth=2, embed_dim=16, num_classes=4
).eval()
# aot_eager: dynamo and autograd as for any compiled model, without a C++ compiler's minute
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
image = torch.randn(2, 3, 16, 16, requires_grad=True)

def run(forward):
    logits = forward(image)
    return logits, *torch.autograd.grad(logits.square().sum(), [image, *model.parameters()])

for backend in ("auto", "reference"):
    svp_peft.set_backend(backend)
    for found, expected in zip(run(compiled), run(model), strict=True):
        torch.testing.assert_close(found, expected)
    print(backend)
"""


def test_a_model_compiled_before_its_first_run_is_one_graph_on_every_backend() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.stdout == "auto\nreference\n", done.stderr

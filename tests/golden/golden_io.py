"""Reader for the golden cases.

from tests.golden.golden_io import ids, load_case
c = load_case("vim_mid")            # id or path
c.meta["kwargs"]                    # constructor kwargs of the official class
c.state                             # official state_dict (float32), stored or regenerated
c["input"], c["out.logits"], c["grad.input"], c["grad.layers.0.mixer.A_log"] ...
c.compare({"out.logits": my_logits, "grad.head.weight": g, ...})   # raises AssertionError
"""

import json
from pathlib import Path

from safetensors import safe_open

from tests.golden import recipe

HERE = Path(__file__).parent

FLOOR = 2e-5  # relative L2 error always allowed
FACTOR = 20.0  # ... or this many times the float32 noise measured on the official code


class Case(dict):
    """dict of tensors + .meta + .state"""

    @property
    def state(self):
        if not hasattr(self, "_state"):
            shapes = self.meta["param_shapes"]
            if self.meta["weights"] == "stored":
                st = {k: self["state." + k] for k in shapes}
            else:
                st = recipe.make_state(self.meta["seed"], shapes, self.meta.get("param_scale"))
            sha = recipe.state_sha256(st)
            assert sha == self.meta["state_sha256"], "recipe does not reproduce the weights"
            st.update({k: self["buffer." + k] for k in self.meta.get("buffers", [])})
            self._state = st
        return self._state

    @property
    def input(self):
        if "input" in self:
            return self["input"]
        x = recipe.make_input(self.meta["seed"], self.meta["input_shape"])
        assert recipe.state_sha256({"input": x}) == self.meta["input_sha256"]
        return x

    def tolerance(self, name):
        """(relative L2 tolerance, absolute tolerance used when the reference is exactly zero)"""
        rel = self.meta["noise"].get(name, (0.0,))[0]  # act.* etc. have no noise entry: floor
        return max(FLOOR, FACTOR * rel), 1e-6

    def error(self, name, value):
        ref = self[name].double()
        d = value.detach().to("cpu").double() - ref
        n = ref.norm().item()
        return d.norm().item() / n if n > 0 else d.abs().max().item() if d.numel() else 0.0

    def compare(self, got, factor=1.0):
        bad = []
        for k, v in got.items():
            assert tuple(v.shape) == tuple(self[k].shape), (k, tuple(v.shape), tuple(self[k].shape))
            rel, absz = self.tolerance(k)
            lim = factor * (absz if k in self.meta.get("zero", ()) else rel)
            e = self.error(k, v)
            if not e <= lim:
                bad.append(f"{k}: {e:.3g} > {lim:.3g}")
        assert not bad, "\n".join(bad)

    def compare_full(self, grads, factor=1.0):
        """svp_full: grads = {official name or "input": gradient}; L2 norms and projections"""
        bad = []
        for k, g in grads.items():
            i = self.meta["grad_names"].index(k)
            n = self["gradnorm"][i].item()
            lim = factor * self.tolerance("grad." + k)[0] * n
            g = g.detach().to("cpu").double()
            if not abs(g.norm().item() - n) <= lim:
                bad.append(f"{k}: norm {g.norm().item():.8g}, want {n:.8g}")
            for j in range(4):
                p, w = recipe.projection(self.meta["seed"], k, g, j), self["gradproj"][i, j].item()
                if not abs(p - w) <= 4 * lim:
                    bad.append(f"{k}: projection {j} {p:.8g}, want {w:.8g}")
        assert not bad, "\n".join(bad)


def load_case(path: str | Path) -> Case:
    path = Path(path)
    if not path.exists():
        path = HERE / f"{path}.safetensors"
    c = Case()
    with safe_open(str(path), "pt") as h:
        c.meta = json.loads(h.metadata()["json"])
        for k in h.keys():
            c[k] = h.get_tensor(k)
    return c


def ids(family: str | None = None) -> list[str]:
    index = json.loads((HERE / "index.json").read_text())
    return [c["id"] for c in index["cases"] if family is None or c["family"] == family]

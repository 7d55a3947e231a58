"""What is done to the scores of a written-out attention, from its softmax up to the product of queries and keys.

Factors, biases, masks, a softcap, casts and views, read by what they are to a softmax: a number that is subtracted from
a whole row is nothing to it, whatever it is. Anything else on the way is a refusal with its reason.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.edit import argument, is_tensor, shape_of
from spcompile.graph.einsum import letters_of
from spcompile.recognition.masks.bits import is_of_bits
from spcompile.recognition.masks.finite import is_finite
from spcompile.recognition.masks.index_maps import sizes_of

aten = torch.ops.aten

CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default}
CASTS |= {aten.type_as.default, aten.contiguous.default, aten.clone.default, aten.alias.default}
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
VIEWS |= {aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default}


class Refused(Exception):
    """An attention in a form that cannot be taken; `node` is the call that stops it."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclass(frozen=True)
class Term:
    """Something done to the scores, in the order of application from last to first.

    node: the added bias, or the mask. at: the scores after it.
    fill: None for a bias, else what replaces the score where the mask equals `masked`.
    factor: what the scores, this term among them, are multiplied with afterwards.
    dtype: the one that rounds most of those that the scores have from here to the softmax.
    """

    node: fx.Node
    at: fx.Node
    dtype: torch.dtype
    factor: float = 1.0
    fill: float | None = None
    masked: bool = True


@dataclass(frozen=True)
class Product:
    """One of the two products: operands, and how einsum names their dims (None for matmul)."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    equation: tuple[str, str, str] | None = None


@dataclass
class EagerAttention:
    """What was found.

        result = dropout(softmax([cap(scale * factors * (queries @ keys)) + terms, sinks])) @ values

    logits: the scores that enter the softmax, without the sinks' column. sinks: that column.
    lowest: what nan_to_num makes of -inf, once it was found on the way up. Finite scores it leaves alone.
    factors: tensors with one number for each row, head or all, and whether the scores are divided by them.
    """

    softmax: fx.Node
    logits: fx.Node
    scores: Product
    result: Product
    scale: float = 1.0
    factors: list[tuple[fx.Node, bool]] = field(default_factory=list)
    softcap: float = 0.0
    terms: list[Term] = field(default_factory=list)
    sinks: fx.Node | None = None
    dropout: float = 0.0
    lowest: float | None = None


def without_maximum(node: Any, dim: int = -1) -> Any:
    """The operand x of x - max(x), a maximum over `dim`: the same to a softmax over it."""
    while node.target is aten.sub.Tensor and all(map(is_tensor, node.args)) and argument(node, 2, "alpha", 1) == 1:
        x, maximum = node.args
        while maximum.target in CASTS or maximum.target is aten.detach.default:
            maximum = maximum.args[0]
        puts_back = maximum if maximum.target is aten.unsqueeze.default else None
        maximum = maximum.args[0] if puts_back is not None else maximum
        if maximum.target is operator.getitem and maximum.args[1] == 0:
            maximum = maximum.args[0]
        if maximum.target not in (aten.max.dim, aten.amax.default):
            return node
        is_kept = argument(maximum, 2, "keepdim", False)
        if is_kept == (puts_back is not None):
            return node
        if puts_back is not None and puts_back.args[1] % len(shape_of(x)) != dim % len(shape_of(x)):
            return node
        dims = argument(maximum, 1, "dim")
        rank = len(shape_of(x))
        over = [d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])]
        if _detached(maximum.args[0]) is not _detached(x) or over != [dim % rank]:
            return node
        node = x
    return node


def _detached(node: Any) -> fx.Node:
    return node.args[0] if node.target is aten.detach.default else node


def keeps_last_two(view: fx.Node) -> bool:
    source: Any = view.args[0]
    before, after = sizes_of(source), sizes_of(view)
    return len(before) in (3, 4) and len(after) in (3, 4) and before[-2:] == after[-2:]


def product_of(node: fx.Node) -> Product | None:
    """The product that this call is, in three or four dims, or in five with groups of heads; None if it is none."""
    if node.target in _PRODUCTS:
        left, right = node.args[:2]
        if len(shape_of(left)) == len(shape_of(right)) in (3, 4, 5):  # type: ignore[arg-type]
            return Product(node, left, right)  # type: ignore[arg-type]
        return None
    if node.target is aten.baddbmm.default:
        return Product(node, node.args[1], node.args[2])  # type: ignore[arg-type]
    if node.target is aten.einsum.default:
        operands: Any = node.args[1]
        letters, output = letters_of(str(node.args[0]), [len(shape_of(x)) for x in operands])
        is_each_once = all(len(set(x)) == len(x) for x in (*letters, output))
        ranks = {3: {3}, 4: {3, 4}, 5: {3, 4, 5}}.get(len(output), set())
        if is_each_once and len(letters) == 2 and {len(x) for x in letters} <= ranks:
            known: dict[str, Any] = {}
            named = [pair for x, t in zip(letters, operands, strict=True) for pair in zip(x, sizes_of(t), strict=True)]
            if all(known.setdefault(letter, size) == size for letter, size in named):  # nothing is broadcast
                return Product(node, operands[0], operands[1], equation=(letters[0], letters[1], output))
    return None


def _is_number(arg: Any) -> bool:
    return isinstance(arg, int | float) and not isinstance(arg, bool)


def product_below(node: fx.Node) -> Product:
    """The product of queries and keys that these scores come from."""
    product = product_of(node)
    if product is not None:
        return product
    following = scores_operand(node)
    if following is None:
        raise Refused(f"{node.target} between the scores and the softmax", node)
    return product_below(following)


def scores_operand(node: fx.Node) -> fx.Node | None:
    """The operand of this call that holds the scores; None if the call is not one that may stand here."""
    args: tuple[Any, ...] = node.args
    if node.target in CASTS or (node.target in VIEWS and keeps_last_two(node)):
        return args[0] if node.meta["val"].dtype.is_floating_point else None
    if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        pairs = (args[:2], args[1::-1])[: 1 if node.target is aten.div.Tensor else 2]
        return (
            args[0]
            if _is_number(args[1])
            else next((x for x, y in pairs if _is_factor(y, node) or _is_mask(y, x, node)), None)
        )
    if node.target is aten.tanh.default:
        return args[0]
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return args[0]
    if node.target in (aten.where.ScalarOther, aten.where.ScalarSelf):
        return args[1] if node.target is aten.where.ScalarOther else args[2]
    if node.target is aten.where.self:
        return next((arg for arg in args[1:] if is_tensor(arg) and _leads_to_scores(arg)), None)
    if node.target is aten.add.Tensor and argument(node, 2, "alpha", 1) == 1:
        return next((arg for arg in args[:2] if is_tensor(arg) and _leads_to_scores(arg)), None)
    if node.target is aten.sub.Tensor and argument(node, 2, "alpha", 1) == 1:
        return args[0] if is_tensor(args[0]) and _leads_to_scores(args[0]) else None
    if node.target is aten.nan_to_num.default:
        return args[0]
    return None


def _is_factor(given: Any, node: fx.Node) -> bool:
    """Whether what scores are multiplied with is one number for each row, or fewer: learned, not made of scores."""
    if not is_tensor(given) or not given.meta["val"].dtype.is_floating_point or _leads_to_scores(given):
        return False
    return sizes_of(node)[-1] != 1 and (not shape_of(given) or sizes_of(given)[-1] == 1)


def _is_mask(given: Any, scores: Any, product: fx.Node) -> bool:
    """Whether scores are multiplied with zeros and ones."""
    if product.target is not aten.mul.Tensor or not (is_tensor(given) and is_tensor(scores)):
        return False
    return _leads_to_scores(scores) and not _leads_to_scores(given) and is_of_bits(given)


def _is_of_rows(subtracted: Any) -> bool:
    """Whether one number for each row, or for all, is taken away, such as a maximum."""
    return is_tensor(subtracted) and (not shape_of(subtracted) or sizes_of(subtracted)[-1] == 1)


def _leads_to_scores(node: fx.Node) -> bool:
    try:
        product_below(node)
    except Refused:
        return False
    return True


def peel(node: fx.Node, factor: float, dtype: torch.dtype, found: EagerAttention) -> None:
    """Collect what is done to the scores between `node` and their product into `found`."""
    args: tuple[Any, ...] = node.args
    dtype = max(dtype, _dtype(node), key=lambda x: torch.finfo(x).eps)
    if node is found.scores.node:
        found.scale = factor
        if node.target is aten.baddbmm.default:
            beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
            if beta != 0 and found.softcap:
                raise Refused("a bias inside of a softcap", node)
            if beta != 0:
                found.terms.append(Term(args[0], node, dtype, factor * float(beta)))  # type: ignore[arg-type]
            found.scale = factor * float(alpha)  # type: ignore[arg-type]
        return
    below = scores_operand(node)
    assert below is not None
    inside_cap, inside_factor = found.softcap != 0, bool(found.factors)
    count = len(found.terms)
    if node.target is aten.tanh.default:
        if inside_factor:
            raise Refused("a softcap inside of a factor that is no constant", node)
        if inside_cap or factor == 0:
            raise Refused("a softcap of a softcap", node)
        found.softcap = abs(factor)
    elif node.target in (aten.mul.Tensor, aten.div.Tensor) and is_tensor(args[1]):
        if shape_of(node) != shape_of(found.scores.node):
            raise Refused("scores of another shape than queries times keys", node)
        factor_of_rows = args[1] if args[0] is below else args[0]
        if _is_factor(factor_of_rows, node):
            found.factors.append((factor_of_rows, node.target is aten.div.Tensor))
        else:
            found.terms.append(Term(factor_of_rows, node, dtype, factor, 0.0, masked=False))
    elif node.target in (aten.mul.Tensor, aten.mul.Scalar):
        factor *= args[1]
    elif node.target in (aten.div.Tensor, aten.div.Scalar):
        factor /= args[1]
    elif node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        fill = _fill_of(args[2], node, factor, found)
        found.terms.append(Term(args[1], node, dtype, factor, fill, masked=True))
    elif node.target in (aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.self):
        keeps = args[1] is below
        fill = _fill_of(args[2 if keeps else 1], node, factor, found)
        found.terms.append(Term(args[0], node, dtype, factor, fill, masked=not keeps))
    elif node.target is aten.nan_to_num.default:
        lowest = argument(node, 3, "neginf")
        found.lowest = float(torch.finfo(_dtype(node)).min if lowest is None else lowest) * factor
    elif node.target in (aten.add.Tensor, aten.sub.Tensor):
        added = args[1] if args[0] is below else args[0]
        if node.target is aten.sub.Tensor and _is_of_rows(added) and sizes_of(node)[-1] != 1:
            if inside_cap or inside_factor or found.sinks is not None or found.lowest is not None:
                raise Refused("a number of each row is subtracted from what counts beside other numbers", node)
        elif is_tensor(added):
            if found.lowest is not None and not is_finite(added):
                raise Refused("numbers that may be -inf are added to scores inside of nan_to_num", node)
            found.terms.append(Term(added, node, dtype, -factor if node.target is aten.sub.Tensor else factor))
        elif added != 0 and (inside_cap or inside_factor or found.sinks is not None):
            raise Refused("a number is added to scores inside of a softcap or beside sinks", node)
    if (inside_cap or inside_factor) and len(found.terms) > count:
        raise Refused(
            f"a bias or a mask inside of {'a softcap' if inside_cap else 'a factor that is no constant'}", node
        )
    peel(below, factor, dtype, found)


def _fill_of(arg: Any, node: fx.Node, factor: float, found: EagerAttention) -> float:
    """What takes the place of scores; nan_to_num has put a finite number there if it was -inf."""
    fill = _scalar(arg, node)
    return found.lowest / factor if found.lowest is not None and fill * factor == -torch.inf else fill


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _scalar(arg: Any, node: fx.Node) -> float:
    """A number, or a tensor that holds one number."""
    while is_tensor(arg) and arg.target in CASTS | {
        aten.lift_fresh_copy.default,
        aten.expand.default,
        aten.detach.default,
    }:
        arg = arg.args[0]
    if _is_number(arg):
        return float(arg)
    if is_tensor(arg) and arg.target in (aten.full.default, aten.full_like.default, aten.scalar_tensor.default):
        value = arg.args[0] if arg.target is aten.scalar_tensor.default else argument(arg, 1, "fill_value")
        if _is_number(value):
            return float(value)
    if is_tensor(arg) and arg.op == "get_attr":
        constant = getattr(arg.graph.owning_module, str(arg.target), None)
        if isinstance(constant, torch.Tensor) and constant.numel() == 1:
            return float(constant)
    raise Refused("the scores are replaced by something that is not a constant", node)

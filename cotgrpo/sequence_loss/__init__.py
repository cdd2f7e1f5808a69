"""A loss of whole replies: a function of the losses of a reply's tokens. The model runs once.

    loss = mean over replies of f(l_1, ..., l_n),    l_t = objective(logits_t, inputs_t)

The gradient in the logits is `c_t dl_t`, with the slope `c_t = df / dl_t`. A slope may depend on the losses of all
tokens of its reply. So the head and the objective run twice over tiles of supervised tokens, as in `tiled_loss`: for
the losses, and then for the gradients. These are four matrix products a token in place of three. If `f` is linear in
the losses, no slope depends on a loss. XLA then removes the first pass, and three products are left.

A reply is the supervised tokens of one document. A packed row has several.
"""

from cotgrpo.sequence_loss.inputs import SequenceInputs, SequenceLoss
from cotgrpo.sequence_loss.sums import SequenceSums, count_replies, number_documents, sequence_sums

__all__ = ["SequenceInputs", "SequenceLoss", "SequenceSums", "count_replies", "number_documents", "sequence_sums"]

"""What can be wrong with a schedule: one error for each finding."""

from __future__ import annotations

from whalepy.errors import VerificationError

FIX = "this is a defect of whalepy, not of the model: please report it with str(plan) and the schedule"


class MissingAction(VerificationError):
    """A compute action or a REDUCE that a stage owes is not in the list of its group."""


class RepeatedAction(VerificationError):
    """An action comes twice, or one microbatch runs its backward both whole and in two parts."""


class UnexpectedAction(VerificationError):
    """An action that no stage of the group, no crossing and no lending asks for."""


class BackwardBeforeForward(VerificationError):
    """A backward stands before the forward of its microbatch."""


class WeightsBeforeInputs(VerificationError):
    """Weight gradients stand before the gradient of the inputs that leaves them."""


class UsedBeforeReceived(VerificationError):
    """A compute action stands before a receive that it needs, or the receive is missing on both sides."""


class ParameterBeforeReceived(VerificationError):
    """A stage computes before it has a parameter that another stage lends it."""


class SentBeforeComputed(VerificationError):
    """A send stands before the compute action whose result it sends."""


class SendWithoutReceive(VerificationError):
    """Something is sent that nobody receives."""


class ReceiveWithoutSend(VerificationError):
    """Something is awaited that nobody sends."""


class MessagesOutOfOrder(VerificationError):
    """One side receives in another order than the other side sends."""


class ReduceTooEarly(VerificationError):
    """A stage reduces its gradients before its last backward."""


class GradientTooEarly(VerificationError):
    """The gradient of a lent parameter is sent, or taken, before the stage has reduced its own."""


class WaitCycle(VerificationError):
    """Groups would wait for each other for ever."""


class SizeMismatch(VerificationError):
    """One rank sends another number of elements than the other expects."""


class DtypeMismatch(VerificationError):
    """One rank sends another dtype than the other expects."""

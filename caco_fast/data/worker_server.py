"""What the server of the worker processes imports before it forks any; nothing else imports this."""

import caco_fast.data.reading  # noqa: F401
from caco_fast.data.workers import leave_interrupts_to_the_trainer

# The workers of a server that a signal ends would be taken for dead.
leave_interrupts_to_the_trainer()

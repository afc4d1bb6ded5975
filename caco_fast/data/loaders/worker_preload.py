"""The imports of the server of worker processes before it forks any worker; nothing else imports this module."""

import caco_fast.data.loaders.evaluation  # noqa: F401
from caco_fast.data.loaders.workers import leave_interrupts_to_the_trainer

# If a signal ended the server, its workers would be taken for dead.
leave_interrupts_to_the_trainer()

"""Installs `bandit_rft.integrations.verl` where it is imported, as verl asks of an external module.

VERL_USE_EXTERNAL_MODULES=bandit_rft.integrations.verl_external
actor_rollout_ref.model.external_lib=bandit_rft.integrations.verl_external
"""

from bandit_rft.integrations.verl import install

install()

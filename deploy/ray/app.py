"""The reward service as a Ray Serve deployment: the same application in every replica, and Ray decides how many.

    serve run deploy/ray/serve.yaml

A replica reads its settings from REWARD_* variables, as `plaudit-reward` does; serve.yaml sets them. Two things differ
from a service of its own: the probe is Ray's, and a reload would reach one replica only, so a new model is a new
deployment.
"""

from fastapi import FastAPI
from ray import serve

from plaudit.reward_service.__main__ import api_keys
from plaudit.reward_service.app_factory import app_from_settings
from plaudit.reward_service.settings import Settings


def reward_app() -> FastAPI:
    """Called once in every replica, where the model is loaded."""
    settings = Settings()
    return app_from_settings(settings, api_keys(settings), reloads=False)


@serve.deployment
@serve.ingress(reward_app)
class Reward:
    """Replaced by Ray when it can't score any more; closed after the requests that it has taken."""

    app: FastAPI

    def check_health(self) -> None:
        reason = self.app.state.service.engine.unready()
        if reason is not None:
            raise RuntimeError(reason)

    def __del__(self) -> None:
        self.app.state.service.engine.close()


app = Reward.bind()

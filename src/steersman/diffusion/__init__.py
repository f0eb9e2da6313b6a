"""Methods for diffusion models, on diffusers' interfaces: one line in a pipeline that you already have.

    from steersman.diffusion import PNDMScheduler
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)

Names are imported when they are first used; the catalogue's cards say which there are.
"""

from steersman.catalog import lazy_exports

# SchedulerMixin is bound here because diffusers looks for it beside the class when it reloads a pipeline.
__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SchedulerMixin": "diffusers.schedulers.scheduling_utils:SchedulerMixin",
        "SolverScheduler": "steersman.diffusion.scheduler:SolverScheduler",
        "DDIMScheduler": "steersman.diffusion.classical:DDIMScheduler",
        "EulerScheduler": "steersman.diffusion.classical:EulerScheduler",
        "HeunScheduler": "steersman.diffusion.classical:HeunScheduler",
        "RK4Scheduler": "steersman.diffusion.classical:RK4Scheduler",
        "DDIM": "steersman.diffusion.classical:DDIM",
        "Euler": "steersman.diffusion.classical:Euler",
        "Heun": "steersman.diffusion.classical:Heun",
        "RK4": "steersman.diffusion.classical:RK4",
        "integrate": "steersman.diffusion.solver:integrate",
        "Guidance": "steersman.diffusion.guidance:Guidance",
        "StockGuidance": "steersman.diffusion.guidance:StockGuidance",
        "Installable": "steersman.diffusion.installing:Installable",
        "installed": "steersman.diffusion.installing:installed",
        "save_steered": "steersman.diffusion.installing:save_steered",
        "load_steered": "steersman.diffusion.installing:load_steered",
        "ClassConditionalPipeline": "steersman.diffusion.pipelines:ClassConditionalPipeline",
    },
)

"""A node's tiers under whatever Hypothesis comes up with: the simulator's world, each rule a thing that befalls it."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stoker_contracts.control import PrefetchModel
from stoker_contracts.models import Tier
from stoker_sim.quiet import quiet
from stoker_sim.store.faults import SELDOM, Faults
from stoker_sim.store.instance import Instance
from stoker_sim.store.node import Node, Shape
from stoker_sim.store.scenario import DOOMS, clear, recover
from stoker_sim.store.world import World

EXAMPLES, STEPS = 50, 40
SHARDS_MAX = 6

nodes = st.integers(0, 1)
models = st.integers(0, 4)
pauses = st.sampled_from((0.0, 0.001, 0.005, 0.03, 0.2))
faults = st.builds(
    Faults,
    disk_full=st.sampled_from((0.0, SELDOM)),
    disk_error=st.sampled_from((0.0, SELDOM)),
    rot=st.sampled_from((0.0, SELDOM)),
    read_error=st.sampled_from((0.0, SELDOM)),
    source_breaks=st.sampled_from((0.0, SELDOM)),
    source_wrong=st.sampled_from((0.0, SELDOM)),
    peer_breaks=st.sampled_from((0.0, SELDOM)),
    peer_wrong=st.sampled_from((0.0, SELDOM)),
)


class TiersMachine(RuleBasedStateMachine):
    world: World | None = None

    @initialize(
        seed=st.integers(0, 2**32), pool_chunks=st.integers(4, 9), ssd_bytes=st.sampled_from((30_000, 60_000, 200_000))
    )
    def begin(self, seed: int, pool_chunks: int, ssd_bytes: int) -> None:
        quiet()
        shape = Shape(pool_chunks, ssd_bytes, ssd_bytes * 2, 3, 1.0, 20_000)
        self.made = World(seed, [shape, shape])
        self.world = self.made
        self.instances: list[Instance] = []
        self.made.deploy(SHARDS_MAX)
        self.made.run_for(0.3)

    def node(self, index: int) -> Node:
        return self.made.nodes[index]

    def model(self, index: int) -> str:
        deployed = self.made.registry.deployed
        return deployed[index % len(deployed)]

    @rule(pause_s=pauses)
    def wait(self, pause_s: float) -> None:
        self.made.run_for(pause_s)

    @rule(node=nodes, model=models, count=st.integers(1, 3), pause_s=pauses)
    def lease(self, node: int, model: int, count: int, pause_s: float) -> None:
        self.instances += [self.made.lease(self.node(node), self.model(model)) for _ in range(count)]
        self.made.run_for(pause_s)

    @rule(which=st.integers(0, 20), pause_s=pauses)
    def kill_instance(self, which: int, pause_s: float) -> None:
        starting = [instance for instance in self.instances if instance.outcome is None]
        if starting:
            starting[which % len(starting)].process.kill()
        self.made.run_for(pause_s)

    @rule(node=nodes, model=models, tier=st.sampled_from((Tier.SSD, Tier.DRAM)), pause_s=pauses)
    def evict(self, node: int, model: int, tier: Tier, pause_s: float) -> None:
        self.made.evict(self.node(node), self.model(model), tier)
        self.made.run_for(pause_s)

    @rule(
        node=nodes,
        model=models,
        tier=st.sampled_from((Tier.SSD, Tier.DRAM)),
        priority=st.integers(0, 2),
        budget_ms=st.sampled_from((0, 50)),
        pause_s=pauses,
    )
    def prefetch(self, node: int, model: int, tier: Tier, priority: int, budget_ms: int, pause_s: float) -> None:
        order = PrefetchModel(model_id=self.model(model), tier=tier, term=1, priority=priority, budget_ms=budget_ms)
        self.made.prefetch(self.node(node), order)
        self.made.run_for(pause_s)

    @rule(node=nodes, model=models, pause_s=pauses)
    def cancel(self, node: int, model: int, pause_s: float) -> None:
        self.made.cancel(self.node(node), self.model(model))
        self.made.run_for(pause_s)

    @precondition(lambda self: not self.made.database_away and len(self.made.registry.deployed) < 5)
    @rule()
    def deploy(self) -> None:
        self.made.deploy(SHARDS_MAX)

    @precondition(lambda self: not self.made.database_away and len(self.made.registry.deployed) > 1)
    @rule(model=models)
    def delete(self, model: int) -> None:
        self.made.delete(self.model(model))

    @rule(node=nodes)
    def kill_agent(self, node: int) -> None:
        agent = self.node(node).agent
        if agent is not None:
            agent.process.kill()

    @rule(node=nodes, doom=st.sampled_from(DOOMS))
    def doom_agent(self, node: int, doom: str) -> None:
        agent = self.node(node).agent
        if agent is not None:
            agent.process.doom = doom

    @rule(node=nodes, pause_s=pauses)
    def stop_agent(self, node: int, pause_s: float) -> None:
        self.made.stop(self.node(node))
        self.made.run_for(pause_s)

    @rule(pause_s=pauses)
    def start_agents(self, pause_s: float) -> None:
        for node in self.made.nodes:
            self.made.start(node)
        self.made.run_for(0.2 + pause_s)

    @rule(node=nodes)
    def kill_worker(self, node: int) -> None:
        self.node(node).worker.kill()

    @rule(node=nodes)
    def rot(self, node: int) -> None:
        self.node(node).disk.rot()

    @rule(away=st.booleans())
    def source(self, away: bool) -> None:
        self.made.source.away = away

    @rule(away=st.booleans())
    def database(self, away: bool) -> None:
        self.made.set_database(away=away)

    @rule(faults=faults)
    def misbehave(self, faults: Faults) -> None:
        self.made.set_faults(faults)

    @invariant()
    def nothing_is_broken(self) -> None:
        if self.world is not None:
            self.world.check()

    def teardown(self) -> None:
        world = self.world
        if world is None:
            return
        try:
            if not world.flaws.found:
                recover(world)
                clear(world)
        finally:
            world.close()


TestTiers = TiersMachine.TestCase
TestTiers.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

// Package manager owns the traffic-manager: sessions, intercepts, injection, and dialling on behalf of laptops.
package manager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/footprint"
	"github.com/doppel-dev/doppel/internal/sched"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// Config is what a manager is started with. Zero values mean the defaults written at each field.
type Config struct {
	Namespace  string // required: the manager's own namespace
	PodName    string // required
	PodIP      string
	AgentImage string // required
	// AgentPullPolicy is the pull policy of injected containers (IfNotPresent).
	AgentPullPolicy string
	AgentLogLevel   string
	AgentResources  string        // a core/v1 ResourceRequirements as JSON; empty: the injector's default
	Volumes         string        // what laptops may do with volumes: none, ro or rw ("ro"); a pod's annotation says otherwise
	HiddenVariables string        // comma-separated: names of variables that laptops do not get
	Namespaces      string        // comma-separated: those that this manager is for; empty: the whole cluster
	RenewInterval   time.Duration // how often laptops renew (10 min); two missed renewals end a session
	LostGrace       time.Duration // how long a session outlives its tunnel (30 s)
	CheckReach      bool          // sessions get to the namespaces on their object only
	Injection       string        // InjectOnDemand (default) or InjectEnabledOnly
	IdleTimeout     time.Duration // after how long without an intercept agents are taken out; 0: never
	NoRedirect      bool          // no agent takes a port by redirect: something of the cluster refuses NET_ADMIN
	NoPolicy        bool          // the cluster has no admission policies of ours, so that nobody vouches for who made an object
	NoWebhook       bool          // the cluster does not ask us about pods, so that nothing can be intercepted
	RelayURL        string        // https://DOMAIN of the relay to join; empty: none
	RelaySecret     string        // directory with the files of the Secret for it ("/etc/doppel/relay")
	APIAddr         string        // attach and webhook (":10250")
	DirectAddr      string        // laptops that come without the API server; empty: they do not
	DirectPublic    string        // comma-separated HOST:PORT where they reach it; empty: what the Service traffic-manager-direct says
	AgentsAddr      string        // agents (":8082")
	HealthAddr      string        // metrics and health (":8081")
	ResolvConf      string        // where the cluster's DNS is found ("/etc/resolv.conf")
	Kube            *rest.Config  // required
	Log             *slog.Logger  // required
	Level           *xlog.Level   // Log's, changed by the ConfigMap traffic-manager-logging; nil: it is not
}

func (c *Config) complete() error {
	var errs []error
	for name, v := range map[string]string{"namespace": c.Namespace, "pod name": c.PodName, "agent image": c.AgentImage} {
		if v == "" {
			errs = append(errs, fmt.Errorf("%s is required", name))
		}
	}
	if c.Kube == nil || c.Log == nil {
		errs = append(errs, errors.New("kube configuration and log are required"))
	}
	if c.NoPolicy && c.Namespaces == "" {
		errs = append(errs, errors.New("without the admission policy namespaces have to be listed"))
	}
	def := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	def(&c.AgentPullPolicy, string(corev1.PullIfNotPresent))
	def(&c.Injection, InjectOnDemand)
	if c.Injection != InjectOnDemand && c.Injection != InjectEnabledOnly {
		errs = append(errs, fmt.Errorf("injection is %q, want %s or %s", c.Injection, InjectOnDemand, InjectEnabledOnly))
	}
	def(&c.AgentLogLevel, "info")
	def(&c.APIAddr, ":10250")
	def(&c.AgentsAddr, ":8082")
	def(&c.HealthAddr, ":8081")
	def(&c.ResolvConf, "/etc/resolv.conf")
	def(&c.RelaySecret, "/etc/doppel/relay")
	if c.RenewInterval <= 0 {
		c.RenewInterval = 10 * time.Minute
	}
	if c.LostGrace <= 0 {
		c.LostGrace = 30 * time.Second
	}
	return errors.Join(errs...)
}

// namespaces are those that the manager is for; none: the whole cluster.
func (c *Config) namespaces() []string {
	if c.Namespaces == "" {
		return nil
	}
	return strings.Split(c.Namespaces, ",")
}

// attachAddr is where this pod answers /attach, or zero.
func (c *Config) attachAddr() netip.AddrPort {
	_, port, err := net.SplitHostPort(c.APIAddr)
	if err != nil {
		return netip.AddrPort{}
	}
	a, err := netip.ParseAddrPort(net.JoinHostPort(c.PodIP, port))
	if err != nil { // a manager that was not told its address
		return netip.AddrPort{}
	}
	return a
}

// Manager is one replica of the traffic-manager. Of several one leads and does everything; the others keep their caches filled.
type Manager struct {
	cfg     Config
	ctrl    ctrl.Manager // its client writes only while we lead
	started time.Time    // of our leading

	election  *election
	place     *place
	clock     *clock
	identity  *tunnel.Identity
	policy    *policyProbe
	tokens    *tokens
	laptops   *laptops
	agents    *agents
	engaged   *engagements
	proofs    *proofs
	presence  *presence
	cluster   *clusterInfo
	addresses addresses
	dns       *dnsForwarder
	logging   *logging
	restorer  *restorer
	relay     *relayLink // nil: there is none
	looked    sync.Map   // UIDs of intercepts that have been looked at since we lead
	wholes    sync.Map   // workloads of which all have been
	watchers  watchers
	questions questions
	noEcho    error                                     // why this pod cannot ping for laptops; nil: it can
	allowed   []string                                  // the namespaces it is for; empty: all
	resources *corev1.ResourceRequirements              // of injected agents; nil: the injector's default
	wakeups   chan event.TypedGenericEvent[workloadKey] // "look at this workload's intercepts again"
}

// New connects to the API server and prepares every part; nothing is served yet.
func New(ctx context.Context, cfg Config) (*Manager, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("manager: %w", err)
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	ctrl.SetLogger(logr.FromSlogHandler(cfg.Log.Handler()))
	clock := new(clock)
	cfg.Kube = rest.CopyConfig(cfg.Kube)
	cfg.Kube.Wrap(clock.wrap)
	var m *Manager
	opts := cacheOptions(cfg)
	opts.NewInformer = newInformer(func(p *corev1.Pod) { m.cluster.seePod(p) }) // there are none before m
	unfenced, err := client.New(cfg.Kube, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("connect to the API server: %w", err)
	}
	e := newElection(unfenced, cfg.Namespace, cfg.PodName, cfg.Log)
	fenced := rest.CopyConfig(cfg.Kube)
	fenced.Wrap(e.fence)
	cm, err := ctrl.NewManager(fenced, ctrl.Options{
		Scheme:                 scheme,
		HealthProbeBindAddress: "0", // served together with the metrics
		Metrics:                metricsserver.Options{BindAddress: "0"},
		Cache:                  opts,
	})
	if err != nil {
		return nil, fmt.Errorf("connect to the API server: %w", err)
	}
	if m, err = assemble(ctx, cfg, cm, e, clock); err != nil {
		return nil, err
	}
	// Laptops' questions about addresses, and whether they may come at all, are not to wait for our own work, nor our work for them.
	asking := rest.CopyConfig(cfg.Kube)
	asking.QPS, asking.Burst = allRate, allRate
	asks, err := client.New(asking, client.Options{Scheme: scheme, Mapper: cm.GetRESTMapper()})
	if err != nil {
		return nil, err
	}
	m.addresses.pods.live, m.policy.client = asks, asks
	m.noEcho = flow.EchoAllowed()
	if cfg.CheckReach {
		if err := indexIPs(ctx, cm.GetFieldIndexer(), m.narrow()); err != nil {
			return nil, err
		}
	}
	return m, m.setupControllers(ctx)
}

// assemble makes the parts of a manager, which reach the API server through cm.
func assemble(ctx context.Context, cfg Config, cm ctrl.Manager, e *election, c *clock) (_ *Manager, err error) {
	m := &Manager{cfg: cfg, ctrl: cm, clock: c, started: time.Now(), election: e, place: newPlace(e, cm.GetClient(), cfg), wakeups: make(chan event.TypedGenericEvent[workloadKey], 1024), allowed: cfg.namespaces()}
	if cfg.AgentResources != "" {
		m.resources = &corev1.ResourceRequirements{}
		if err := json.Unmarshal([]byte(cfg.AgentResources), m.resources); err != nil {
			return nil, fmt.Errorf("resources of the agent: %w", err)
		}
	}
	e.onWin = func() { m.started = time.Now() }
	if m.identity, err = ensureIdentity(ctx, e.kc, cfg); err != nil {
		return nil, err
	}
	m.policy = newPolicyProbe(cm, cfg, m.notifyIntercepts)
	hc, err := rest.HTTPClientFor(cfg.Kube)
	if err != nil {
		return nil, err
	}
	m.tokens = newTokens(hc, cfg.Kube.Host, c)
	m.engaged = newEngagements()
	m.engaged.onSession = m.watchers.notify // laptops first: agents send them flows
	m.proofs = newProofs()
	m.agents = newAgents(m)
	if m.relay, err = newRelayLink(m); err != nil {
		return nil, err
	}
	m.restorer = newRestorer(m)
	m.presence = newPresence(m)
	m.logging = &logging{client: cm.GetAPIReader(), namespace: cfg.Namespace, level: cfg.Level, log: cfg.Log, onChange: m.agents.pushAll}
	m.laptops = newLaptops(m)
	m.cluster = newClusterInfo(cm.GetClient(), cm.GetCache(), clusterDomain(cfg.ResolvConf), self{cfg.Namespace, cfg.attachAddr()}, m.allowed, cfg.Log)
	m.addresses = addresses{cm.GetClient(), newPodOwners(m)}
	if m.dns, err = newDNSForwarder(cfg.ResolvConf); err != nil {
		return nil, err
	}
	return m, nil
}

// cacheOptions keeps the informers small: sessions of one namespace, all else of those that the manager is for, and no managedFields of anything.
func cacheOptions(cfg Config) cache.Options {
	byHand, err := labels.Parse(handmade)
	if err != nil {
		panic(err) // a constant
	}
	var all map[string]cache.Config // nil: the whole cluster
	if list := cfg.namespaces(); len(list) > 0 {
		all = map[string]cache.Config{cfg.Namespace: {}}
		for _, ns := range list {
			all[ns] = cache.Config{}
		}
	}
	intercepts := maps.Clone(all)
	delete(intercepts, cfg.Namespace)
	return cache.Options{
		DefaultNamespaces: all,
		DefaultTransform:  cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&v1alpha1.Session{}:   {Namespaces: map[string]cache.Config{cfg.Namespace: {}}},
			&v1alpha1.Intercept{}: {Namespaces: intercepts},
			&corev1.Node{}:        {Transform: pruneNode},
			&corev1.Service{}:     {Transform: pruneService},
			&corev1.Pod{}:         {Transform: prunePod},

			&discoveryv1.EndpointSlice{}: {Label: byHand},
		},
	}
}

// pruneNode, pruneService and prunePod keep what we read through the cache; a large cluster's objects are otherwise megabytes of
// labels, containers and status. Of pods there are ours only (newInformer); whoever needs more of them asks the API server.
func pruneNode(o any) (any, error) {
	if n, ok := o.(*corev1.Node); ok {
		return &corev1.Node{
			TypeMeta: n.TypeMeta, ObjectMeta: pruneMeta(n),
			Spec:   corev1.NodeSpec{PodCIDR: n.Spec.PodCIDR, PodCIDRs: n.Spec.PodCIDRs},
			Status: corev1.NodeStatus{Addresses: n.Status.Addresses},
		}, nil
	}
	return o, nil
}

func pruneMeta(o client.Object) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: o.GetName(), Namespace: o.GetNamespace(), UID: o.GetUID(), ResourceVersion: o.GetResourceVersion()}
}

func pruneService(o any) (any, error) {
	if s, ok := o.(*corev1.Service); ok {
		return &corev1.Service{
			TypeMeta: s.TypeMeta, ObjectMeta: pruneMeta(s),
			Spec: corev1.ServiceSpec{Selector: s.Spec.Selector, Ports: s.Spec.Ports, ClusterIP: s.Spec.ClusterIP, ClusterIPs: s.Spec.ClusterIPs, Type: s.Spec.Type},
		}, nil
	}
	return o, nil
}

func prunePod(o any) (any, error) {
	if p, ok := o.(*corev1.Pod); ok {
		out := &corev1.Pod{TypeMeta: p.TypeMeta, ObjectMeta: pruneMeta(p), Status: corev1.PodStatus{Phase: p.Status.Phase}}
		out.CreationTimestamp, out.DeletionTimestamp, out.OwnerReferences = p.CreationTimestamp, p.DeletionTimestamp, p.OwnerReferences
		for _, key := range ourAnnotations {
			v := p.Annotations[key]
			if v == "" {
				continue
			}
			if key != agentcfg.AnnotationInject {
				v = "there" // it is long, and nobody reads it here
			}
			metav1.SetMetaDataAnnotation(&out.ObjectMeta, key, v)
		}
		return out, nil
	}
	return o, nil
}

// Run stands by and serves until ctx ends, or another replica leads that took the lead from us.
func (m *Manager) Run(ctx context.Context) error {
	go footprint.Keep(ctx)
	sched.Batch(m.cfg.Log)
	// What serves ends after ctx does: when another is in its place.
	serving, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	electing := make(chan struct{})
	defer context.AfterFunc(ctx, func() {
		if !closed(electing) { // caches that do not fill
			end()
		}
	})()
	always := func(name string, fn func(context.Context) error) error {
		return m.ctrl.Add(runnable(func(ctx context.Context) error {
			if err := fn(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		}))
	}
	leading := func(name string, fn func(context.Context) error) error {
		return always(name, m.election.leading(fn))
	}
	err := errors.Join(
		always("election", func(running context.Context) error {
			close(electing)
			err := m.elect(ctx, running)
			if err == nil {
				end()
			}
			return err
		}),
		always("changes of replicas", func(ctx context.Context) error { return m.place.hear(ctx, m.cfg.Kube, m.ctrl.GetScheme()) }),
		always("place", m.place.run),
		always("policy probe", m.policy.run), // as dry runs, which change nothing
		always("cluster info", m.cluster.run),
		always("log level", m.logging.run),
		leading("ports", m.serve),
		leading("calls of agents", m.agents.call),
		leading("direct addresses", m.publishDirect),
		leading("leases", m.laptops.runLeases),
		leading("silence", m.laptops.runSilence),
		leading("webhook certificate", m.publishCABundle),
		leading("restorer", m.restorer.run),
		leading("agents' presence", m.presence.run),
	)
	if m.relay != nil {
		err = errors.Join(err, leading("relay", m.relay.run))
	}
	if err != nil {
		return err
	}
	m.cfg.Log.Info("starting", "namespace", m.cfg.Namespace, "key", m.identity.Fingerprint())
	g, serving := errgroup.WithContext(serving)
	g.Go(func() error { // from now on: a process that waits for its caches is not to be killed for that
		if err := m.serveHealth(serving); serving.Err() == nil {
			return fmt.Errorf("health: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		defer end()
		return m.ctrl.Start(serving)
	})
	return g.Wait()
}

// elect takes part in the election until ctx ends, and then gives the one who leads next the time to take our place.
func (m *Manager) elect(ctx, running context.Context) error {
	until, stop := context.WithCancel(running)
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	if err := m.election.run(until); err != nil {
		return err
	}
	if closed(m.election.won) && running.Err() == nil {
		m.place.handedOver(running)
	}
	return nil
}

// serve listens, publishes where, and has the Services lead here.
func (m *Manager) serve(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, s := range []struct {
		addr string
		fn   func(context.Context, net.Listener) error
	}{{m.cfg.APIAddr, m.serveAPI}, {m.cfg.AgentsAddr, m.agents.serve}, {m.cfg.DirectAddr, m.serveDirect}} {
		if s.addr == "" {
			continue
		}
		l, err := net.Listen("tcp", s.addr)
		if err != nil {
			return err // and the process ends
		}
		g.Go(func() error { return s.fn(ctx, l) })
	}
	g.Go(func() error {
		for {
			err := publish(ctx, m.election.kc, m.ctrl.GetClient(), m.identity.Fingerprint(), m.cfg)
			if err == nil {
				close(m.place.open)
				return nil
			}
			m.cfg.Log.Warn("not published", "err", err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(leaseRetry):
			}
		}
	})
	return g.Wait()
}

// runnable adapts a function to controller-runtime.
type runnable func(context.Context) error

func (r runnable) Start(ctx context.Context) error { return r(ctx) }

// NeedLeaderElection says no: the election is ours.
func (runnable) NeedLeaderElection() bool { return false }

// leaders is a ctrl.Manager whose parts start when we lead.
type leaders struct {
	ctrl.Manager
	e *election
}

func (l leaders) Add(r manager.Runnable) error {
	return l.Manager.Add(runnable(l.e.leading(r.Start)))
}

// agentsAddress is where agents reach this replica.
func (m *Manager) agentsAddress() string {
	_, port, err := net.SplitHostPort(m.cfg.AgentsAddr)
	if err != nil || m.cfg.PodIP == "" {
		return ""
	}
	return net.JoinHostPort(m.cfg.PodIP, port)
}

// metadataV6 is where EC2 serves instance metadata over IPv6; the IPv4 one (169.254.169.254) is link-local.
var metadataV6 = netip.MustParseAddr("fd00:ec2::254")

// mayDial refuses what only looks like an address of the cluster: the manager's own loopback, link-local (cloud metadata) and multicast.
func mayDial(dst netip.AddrPort) bool {
	a := dst.Addr().Unmap()
	return a.IsValid() && a != metadataV6 && !a.IsUnspecified() && !a.IsLoopback() && !a.IsLinkLocalUnicast() && !a.IsMulticast()
}

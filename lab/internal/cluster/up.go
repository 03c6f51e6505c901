package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"

	"github.com/doppel-dev/doppel/lab/internal/cgroup"
	"github.com/doppel-dev/doppel/lab/internal/controlplane"
	"github.com/doppel-dev/doppel/lab/internal/image"
	"github.com/doppel-dev/doppel/lab/internal/node"
	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/pki"
	"github.com/doppel-dev/doppel/lab/internal/plan"
	"github.com/doppel-dev/doppel/lab/internal/progress"
	"github.com/doppel-dev/doppel/lab/internal/state"
	"github.com/doppel-dev/doppel/lab/internal/system"
	"github.com/doppel-dev/doppel/lab/internal/toolchain"
	"github.com/doppel-dev/doppel/lab/internal/wan"
)

// Options are what a user chooses of a lab.
type Options struct {
	Name  string
	Nodes int
}

// starter is one run of Up.
type starter struct {
	say    *progress.Printer
	cniDir string
	parts
	lab *state.Lab

	mu sync.Mutex // guards lab.Servers while nodes start side by side
}

// parts is what a lab is built from.
type parts struct {
	kube                  string
	pauseImage, pauseFile string
	coreDNSImage, dnsFile string
}

// Up makes the lab run, from whatever state it is in, and returns when a pod runs and cluster DNS answers.
func Up(ctx context.Context, o Options, say *progress.Printer) error {
	if err := (plan.Lab{Name: o.Name, Nodes: o.Nodes}).Validate(); err != nil {
		return err
	}
	s := &starter{say: say}
	if err := s.prepare(ctx); err != nil {
		return err
	}
	unlock, err := state.Lock(o.Name)
	if err != nil {
		return err
	}
	defer unlock()
	switch done, err := s.alreadyUp(o); {
	case err != nil:
		return err
	case done:
		return nil
	}
	if err := s.claim(o); err != nil {
		return err
	}
	if err := s.start(ctx); err != nil {
		return err
	}
	s.lab.Ready = true
	if err := s.lab.Save(); err != nil {
		return err
	}
	say.Step("lab %s is ready: %s", o.Name, s.lab.Plan.APIServerURL())
	return nil
}

// prepare gets programs and images; it changes nothing of a lab.
func (s *starter) prepare(ctx context.Context) error {
	var err error
	s.cniDir, err = system.Ensure(ctx, func(packages []string) {
		s.say.Step("installing %s", strings.Join(packages, " "))
	})
	if err != nil {
		return err
	}
	s.parts, err = build(ctx, s.say)
	return err
}

// Build builds the programs and images of a lab unless they are in the cache.
func Build(ctx context.Context, say *progress.Printer) error {
	_, err := build(ctx, say)
	return err
}

func build(ctx context.Context, say *progress.Printer) (parts, error) {
	var p parts
	program := func(t toolchain.Program) (toolchain.Built, error) {
		b, err := toolchain.Build(ctx, t, func() { say.Step("building %s, once for this version of it", t.Name) })
		if err == nil {
			say.Detail("%s is %s", t.Name, b.Path)
		}
		return b, err
	}
	kube, err := program(toolchain.Kube())
	if err != nil {
		return p, err
	}
	coreDNS, err := program(toolchain.CoreDNS())
	if err != nil {
		return p, err
	}
	pause, err := program(toolchain.Pause())
	if err != nil {
		return p, err
	}
	p.kube = kube.Path
	p.pauseImage, p.pauseFile, err = programImage("pause", pause)
	if err != nil {
		return p, err
	}
	p.coreDNSImage, p.dnsFile, err = programImage("coredns", coreDNS)
	return p, err
}

func programImage(name string, b toolchain.Built) (ref, file string, err error) {
	ref, file = "doppel.lab/"+name+":"+b.Version, b.Path+".tar"
	if _, err := os.Stat(file); err == nil {
		return ref, file, nil
	}
	return ref, file, image.Write(image.Spec{Name: ref, Programs: []image.Program{{Source: b.Path, Target: "/" + name}}}, file)
}

// alreadyUp says whether there is nothing to do. A lab that is damaged or half started is removed.
func (s *starter) alreadyUp(o Options) (bool, error) {
	lab, err := state.Load(o.Name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, remove(state.New(plan.Lab{Name: o.Name}))
	}
	if err == nil && lab.Ready {
		dead := Dead(lab)
		switch {
		case len(dead) == 0 && lab.Plan.Nodes != o.Nodes:
			return false, fmt.Errorf("lab %s is up with %d nodes, not %d: take it down first with: lab down --name %s",
				o.Name, lab.Plan.Nodes, o.Nodes, o.Name)
		case len(dead) == 0:
			s.say.Step("lab %s is already up: %s", o.Name, lab.Plan.APIServerURL())
			return true, nil
		}
		s.say.Step("lab %s is damaged, %s is gone: starting afresh", o.Name, strings.Join(dead, " and "))
	} else {
		s.say.Step("lab %s was left half started: starting afresh", o.Name)
	}
	if lab == nil {
		lab = state.New(plan.Lab{Name: o.Name})
	}
	return false, remove(lab)
}

// claim gives the lab an index of its own and records it.
func (s *starter) claim(o Options) error {
	unlock, err := state.Lock("")
	if err != nil {
		return err
	}
	defer unlock()
	index, err := state.FreeIndex(subnetTaken)
	if err != nil {
		return err
	}
	s.lab = state.New(plan.Lab{Name: o.Name, Index: index, Nodes: o.Nodes})
	for _, dir := range []string{"log", "nodes", "laptops"} {
		if err := os.MkdirAll(s.lab.Path(dir), 0o755); err != nil {
			return err
		}
	}
	return s.lab.Save()
}

// subnetTaken says whether the machine already has a route into the subnet of such a lab.
func subnetTaken(l plan.Lab) bool {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool { return takes(r.Dst, l) })
}

// shortestRoute is the length of the shortest prefix that counts as a use of its addresses. What is shorter (a default route in halves, a VPN's
// 10.0.0.0/8) is there for whatever has no route of its own, and the lab's goes before it.
const shortestRoute = 16

// takes says whether a route's destination, which may be nil, is in the way of the subnet of such a lab.
func takes(dst *net.IPNet, l plan.Lab) bool {
	if dst == nil {
		return false
	}
	ones, _ := dst.Mask.Size()
	return ones >= shortestRoute && (dst.Contains(l.Gateway().AsSlice()) || l.Net().Contains(addr(dst.IP)))
}

func (s *starter) config(n plan.Node) node.Config {
	return node.Config{
		Lab: s.lab.Plan, Node: n, LabDir: s.lab.Path(), Dir: s.lab.Path("nodes", n.Short),
		Kube: s.parts.kube, CNI: s.cniDir, PauseImage: s.pauseImage,
	}
}

func (s *starter) start(ctx context.Context) error {
	if err := s.certificates(); err != nil {
		return fmt.Errorf("certificates: %w", err)
	}
	if err := s.namespaces(); err != nil {
		return err
	}
	s.say.Step("network: router and %d node(s)", s.lab.Plan.Nodes)
	images := make(chan error, 1)
	go func() { images <- s.runtimes(ctx) }()
	err := s.controlPlane(ctx)
	if err := errors.Join(err, <-images); err != nil {
		return err
	}
	return s.cluster(ctx)
}

func (s *starter) certificates() error {
	dir, err := pki.Open(s.lab.Path("pki"))
	if err != nil {
		return err
	}
	ids := controlplane.Identities(s.lab.Plan)
	for _, n := range s.lab.Plan.AllNodes() {
		ids[n.Short] = node.Identity(n)
	}
	for name, id := range ids {
		if err := dir.Issue(name, id); err != nil {
			return err
		}
		conf, err := dir.Kubeconfig(Target(s.lab), name)
		if err != nil {
			return err
		}
		if err := state.WriteFile(dir.Path(name+".conf"), conf, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// namespaces makes the router and the nodes and wires them.
func (s *starter) namespaces() error {
	_, err := ns.Start(wan.Spec(s.lab), s.lab.Path("log", "router.log"), func(p state.Process) error {
		s.lab.Wan = p
		return s.lab.Save()
	})
	if err == nil {
		err = wan.SetUp(s.lab.Plan, s.lab.Wan)
	}
	if err != nil {
		return blame(s.lab, "router", err)
	}
	for _, n := range s.lab.Plan.AllNodes() {
		if err := s.makeNode(n); err != nil {
			return blame(s.lab, n.Short, err)
		}
	}
	return nil
}

func (s *starter) makeNode(n plan.Node) error {
	c := s.config(n)
	for _, dir := range c.Dirs() {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for path, content := range c.Files() {
		if err := state.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	if err := cgroup.Create(c.Cgroup()); err != nil {
		return err
	}
	holder, err := ns.Start(c.Spec(), logPath(s.lab, n.Short), func(p state.Process) error {
		s.lab.Nodes[n.Short] = p
		return s.lab.Save()
	})
	if err != nil {
		return err
	}
	return wan.JoinNode(s.lab.Plan, s.lab.Wan, holder, n)
}

// server starts a server in a node.
func (s *starter) server(n plan.Node, name string, argv []string) error {
	s.say.Detail("starting %s: %s", name, strings.Join(argv, " "))
	p, err := ns.Detach(s.lab.Nodes[n.Short], logPath(s.lab, name), serverEnv(), argv...)
	if err != nil {
		return blame(s.lab, name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lab.Servers[name] = state.Server{Node: n.Short, Process: p, Argv: argv}
	return s.lab.Save()
}

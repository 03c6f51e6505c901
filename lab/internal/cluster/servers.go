package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"

	"github.com/doppel-dev/doppel/lab/internal/controlplane"
	"github.com/doppel-dev/doppel/lab/internal/kubeapi"
	"github.com/doppel-dev/doppel/lab/internal/node"
	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/plan"
	"github.com/doppel-dev/doppel/lab/internal/state"
	"github.com/doppel-dev/doppel/lab/internal/toolchain"
)

func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// runtimes starts the container runtime of every node and gives it the lab's images.
func (s *starter) runtimes(ctx context.Context) error {
	var g errgroup.Group
	for _, n := range s.lab.Plan.AllNodes() {
		g.Go(func() error {
			name := n.Short + "/containerd"
			if err := s.server(n, name, s.config(n).Containerd()); err != nil {
				return err
			}
			holder := s.lab.Nodes[n.Short]
			err := s.wait(ctx, name, func(context.Context) error { return runInNode(holder, nil, node.Ping()...) })
			if err != nil {
				return err
			}
			for _, file := range []string{s.pauseFile, s.dnsFile} {
				if err := importImage(holder, file); err != nil {
					return blame(s.lab, name, err)
				}
			}
			s.say.Step("%s: container runtime with the lab's images", n.Name)
			return nil
		})
	}
	return g.Wait()
}

// wait is poll with the servers of the moment.
func (s *starter) wait(ctx context.Context, server string, check func(context.Context) error) error {
	s.mu.Lock()
	snapshot := *s.lab
	snapshot.Servers = make(map[string]state.Server, len(s.lab.Servers))
	for k, v := range s.lab.Servers {
		snapshot.Servers[k] = v
	}
	s.mu.Unlock()
	return poll(ctx, &snapshot, server, check)
}

// controlPlane starts store and API server and waits until it is ready.
func (s *starter) controlPlane(ctx context.Context) error {
	first, c := s.lab.Plan.Node(1), s.control()
	if err := s.server(first, "etcd", c.Etcd()); err != nil {
		return err
	}
	if err := s.server(first, "kube-apiserver", c.APIServer()); err != nil {
		return err
	}
	client, err := Client(s.lab)
	if err != nil {
		return err
	}
	err = s.wait(ctx, "kube-apiserver", func(ctx context.Context) error {
		_, err := client.GetRaw(ctx, "/readyz")
		return err
	})
	if err != nil {
		return err
	}
	s.say.Step("etcd and kube-apiserver %s", toolchain.Kubernetes)
	return nil
}

func (s *starter) control() controlplane.Config {
	return controlplane.Config{Lab: s.lab.Plan, Kube: node.Kube, PKI: s.lab.Path("pki"), Data: s.lab.Path("etcd")}
}

// cluster starts everything that needs the API server, and waits until pods run and DNS answers.
func (s *starter) cluster(ctx context.Context) error {
	client, err := Client(s.lab)
	if err != nil {
		return err
	}
	for _, n := range s.lab.Plan.AllNodes() {
		path, object := s.config(n).Object()
		if err := client.Apply(ctx, path, []byte(object)); err != nil {
			return blame(s.lab, "kube-apiserver", err)
		}
	}
	first, c := s.lab.Plan.Node(1), s.control()
	if err := errors.Join(
		s.server(first, "kube-controller-manager", c.ControllerManager()),
		s.server(first, "kube-scheduler", c.Scheduler()),
	); err != nil {
		return err
	}
	for _, n := range s.lab.Plan.AllNodes() {
		c := s.config(n)
		if err := errors.Join(
			s.server(n, n.Short+"/kubelet", c.Kubelet()),
			s.server(n, n.Short+"/kube-proxy", c.Proxy()),
		); err != nil {
			return err
		}
	}
	for _, o := range controlplane.DNS(s.coreDNSImage) {
		// The API server makes kube-system shortly after it says it is ready.
		err := s.wait(ctx, "kube-apiserver", func(ctx context.Context) error { return client.Apply(ctx, o.Path, []byte(o.YAML)) })
		if err != nil {
			return err
		}
	}
	return s.ready(ctx, client)
}

func (s *starter) ready(ctx context.Context, client *kubeapi.Client) error {
	for _, n := range s.lab.Plan.AllNodes() {
		err := s.wait(ctx, n.Short+"/kubelet", func(ctx context.Context) error { return nodeReady(ctx, client, n.Name) })
		if err != nil {
			return err
		}
		s.say.Step("%s is ready", n.Name)
	}
	err := s.wait(ctx, "node1/kubelet", func(ctx context.Context) error { return podRuns(ctx, client) })
	if err != nil {
		return err
	}
	s.say.Step("a pod runs")
	for _, n := range s.lab.Plan.AllNodes() {
		holder := s.lab.Nodes[n.Short]
		err := s.wait(ctx, n.Short+"/kube-proxy", func(context.Context) error { return ns.Do(holder, ns.Net, dnsAnswers) })
		if err != nil {
			return err
		}
	}
	s.say.Step("cluster DNS answers on %s", plan.ClusterDNS)
	return nil
}

type conditions struct {
	Status struct {
		Conditions []struct{ Type, Status, Reason, Message string }
	}
}

func (c conditions) require(kind string) error {
	for _, cond := range c.Status.Conditions {
		if cond.Type == kind {
			if cond.Status == "True" {
				return nil
			}
			return fmt.Errorf("condition %s is %s: %s %s", kind, cond.Status, cond.Reason, cond.Message)
		}
	}
	return fmt.Errorf("no condition %s yet", kind)
}

func nodeReady(ctx context.Context, client *kubeapi.Client, name string) error {
	var c conditions
	if err := client.Get(ctx, "/api/v1/nodes/"+name, &c); err != nil {
		return err
	}
	return c.require("Ready")
}

// podRuns says whether a pod of the cluster's DNS server is ready.
func podRuns(ctx context.Context, client *kubeapi.Client) error {
	var list struct{ Items []conditions }
	if err := client.Get(ctx, "/api/v1/namespaces/kube-system/pods?labelSelector=k8s-app%3Dkube-dns", &list); err != nil {
		return err
	}
	err := errors.New("no pod of coredns yet")
	for _, pod := range list.Items {
		if err = pod.require("Ready"); err == nil {
			return nil
		}
	}
	return err
}

// dnsAnswers asks the cluster's DNS server for the API server, from the network namespace of the thread.
func dnsAnswers() error {
	c := dns.Client{Timeout: time.Second}
	q := new(dns.Msg).SetQuestion("kubernetes.default.svc."+plan.ClusterDomain+".", dns.TypeA)
	r, _, err := c.Exchange(q, netip.AddrPortFrom(plan.ClusterDNS, 53).String())
	if err != nil {
		return err
	}
	if len(r.Answer) == 1 {
		if a, ok := r.Answer[0].(*dns.A); ok && addr(a.A) == plan.KubernetesI {
			return nil
		}
	}
	return fmt.Errorf("answer %s with %d records", dns.RcodeToString[r.Rcode], len(r.Answer))
}

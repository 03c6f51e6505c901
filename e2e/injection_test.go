package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// annotate sets doppel.dev/inject on a Deployment's pod template.
func (c *cluster) annotate(t *testing.T, ns, deployment, value string) {
	t.Helper()
	patch := fmt.Sprintf(`{"spec":{"template":{"metadata":{"annotations":{"doppel.dev/inject":%q}}}}}`, value)
	ok(c.core.AppsV1().Deployments(ns).Patch(t.Context(), deployment, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}))(t)
}

// agentsOf are the names of a service's pods that stay, and how many of them have an agent.
func (c *cluster) agentsOf(t *testing.T, ns, app string) (pods []string, agents int) {
	t.Helper()
	list := ok(c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app}))(t)
	for _, p := range list.Items {
		if p.DeletionTimestamp != nil {
			continue
		}
		pods = append(pods, p.Name)
		if slices.ContainsFunc(p.Spec.Containers, func(c corev1.Container) bool { return c.Name == "traffic-agent" }) {
			agents++
		}
	}
	slices.Sort(pods)
	return pods, agents
}

func (c *cluster) generation(t *testing.T, ns, deployment string) int64 {
	t.Helper()
	return ok(c.core.AppsV1().Deployments(ns).Get(t.Context(), deployment, metav1.GetOptions{}))(t).Generation
}

// TestInjection is who has an agent when: by annotation, by the chart's policy, and no longer than it is used.
func TestInjection(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "injection")
	c.sample(t, ns)
	l := newLaptop(t, "injector")
	l.withoutManager(t)
	const kept, other = "dataprocessingservice", "verylargejavaservice"
	c.annotate(t, ns, kept, "enabled")
	c.available(t, ns, kept)
	generation := c.generation(t, ns, kept)
	load := c.load(t, "http://"+c.clusterIP(t, ns, kept)+"/color")
	l.run(t, "doppel", "helm", "install", "--set", "agent.idleTimeout=12s")

	t.Run("enabled, on pods that exist", func(t *testing.T) {
		eventually(t, 40*time.Second, func() error {
			if pods, agents := c.agentsOf(t, ns, kept); agents == 0 || agents != len(pods) {
				return fmt.Errorf("%d of the pods %v have an agent", agents, pods)
			}
			return nil
		})
		c.available(t, ns, kept)
		if got := bodies(load.stop()); len(got) != 1 || got[`"green"`] == 0 {
			t.Errorf("answers meanwhile: %v", got)
		}
		if got := c.generation(t, ns, kept); got != generation+1 {
			t.Errorf("the workload was changed %d times", got-generation)
		}
		before, _ := c.agentsOf(t, ns, kept)
		l.run(t, "doppel", "connect", "-n", ns)
		l.colors(t, "blue", "127.0.0.1:3000")
		want(t, l.run(t, "doppel", "intercept", kept, "-p", "3000"), "State          : ACTIVE")
		if got := c.color(t, c.clusterIP(t, ns, kept)); got != "blue" {
			t.Errorf("answers %q", got)
		}
		if after, _ := c.agentsOf(t, ns, kept); !slices.Equal(before, after) {
			t.Errorf("the intercept restarted pods: %v, %v", before, after)
		}
		if r := l.try(t, "doppel", "uninstall", "--agent", kept); r.code == 0 || !strings.Contains(r.stderr, "keeps its traffic-agent") {
			t.Errorf("%v", r)
		}
	})
	t.Run("idle", func(t *testing.T) {
		want(t, l.run(t, "doppel", "intercept", other, "-p", "3001:8080"), "State          : ACTIVE")
		l.run(t, "doppel", "leave", other)
		if _, agents := c.agentsOf(t, ns, other); agents == 0 {
			t.Fatal("the agent went with the intercept")
		}
		eventually(t, 40*time.Second, func() error {
			if pods, agents := c.agentsOf(t, ns, other); agents > 0 {
				return fmt.Errorf("%d of the pods %v have an agent", agents, pods)
			}
			return nil
		})
		if _, agents := c.agentsOf(t, ns, kept); agents == 0 {
			t.Error("and that of the workload that always has one")
		}
		events := ok(c.core.CoreV1().Events(ns).List(t.Context(), metav1.ListOptions{FieldSelector: "reason=RestartedForAgent"}))(t)
		if len(events.Items) != 2 {
			t.Errorf("%d events tell of restarts", len(events.Items))
		}
	})
	t.Run("disabled, while it is intercepted", func(t *testing.T) {
		c.annotate(t, ns, kept, "disabled")
		eventually(t, 30*time.Second, func() error {
			if out := l.run(t, "doppel", "status"); !strings.Contains(out, "doppel.dev/inject: disabled") {
				return fmt.Errorf("%s", out)
			}
			if got := c.color(t, c.clusterIP(t, ns, kept)); got != "green" {
				return fmt.Errorf("answers %q", got)
			}
			return nil
		})
	})
	t.Run("enabledOnly", func(t *testing.T) {
		l.run(t, "doppel", "helm", "upgrade", "--set", "agent.injection=enabledOnly")
		eventually(t, 20*time.Second, func() error {
			if r := l.try(t, "doppel", "intercept", other, "-p", "3001:8080"); r.code == 0 || !strings.Contains(r.stderr, "agent.injection: enabledOnly") {
				return fmt.Errorf("%v", r)
			}
			return nil
		})
		l.run(t, "doppel", "quit")
		l.run(t, "doppel", "connect", "-n", ns)
		want(t, l.run(t, "doppel", "list"), other+" : cannot be intercepted: its pod template does not say doppel.dev/inject: enabled (agent.injection: enabledOnly)")
		c.annotate(t, ns, kept, "enabled")
		eventually(t, 20*time.Second, func() error {
			if pods, agents := c.agentsOf(t, ns, kept); agents == 0 {
				return fmt.Errorf("%d of the pods %v have an agent", agents, pods)
			}
			return nil
		})
	})
	l.run(t, "doppel", "uninstall", "--everything")
	c.empty(t, ns)
}

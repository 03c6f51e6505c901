package e2e

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// managerIn makes a namespace and installs a manager there for others.
func (l *laptop) managerIn(t *testing.T, ns, forNS string) {
	t.Helper()
	l.c.namespace(t, ns)
	t.Cleanup(func() { l.try(t, "doppel", "helm", "uninstall", "--manager-namespace", ns) })
	l.run(t, "doppel", "helm", "install", "--manager-namespace", ns, "--set", "namespaces={"+forNS+"}")
}

// clusterRights fails if a manager has more of the whole cluster than its own webhook.
func (c *cluster) clusterRights(t *testing.T, managerNS string) {
	t.Helper()
	bindings := ok(c.core.RbacV1().ClusterRoleBindings().List(t.Context(), metav1.ListOptions{}))(t)
	for _, b := range bindings.Items {
		for _, s := range b.Subjects {
			if s.Kind != "ServiceAccount" || s.Namespace != managerNS {
				continue
			}
			role := ok(c.core.RbacV1().ClusterRoles().Get(t.Context(), b.RoleRef.Name, metav1.GetOptions{}))(t)
			for _, r := range role.Rules {
				if fmt.Sprint(r.ResourceNames) != "[doppel-agent-injector-"+managerNS+"]" {
					t.Errorf("the manager in %s may %+v in the whole cluster", managerNS, r)
				}
			}
		}
	}
}

// hasCRDs says whether the cluster has doppel's resource types.
func (c *cluster) hasCRDs(t *testing.T) bool {
	t.Helper()
	var list metav1.PartialObjectMetadataList
	c.get(t, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &list)
	for _, o := range list.Items {
		if strings.HasSuffix(o.Name, ".doppel.dev") {
			return true
		}
	}
	return false
}

// TestNamespaced is managers that are for one namespace each, side by side, and one that may bring nothing for the cluster.
func TestNamespaced(t *testing.T) {
	c := theCluster(t)
	left, right, bare := c.namespace(t, "left"), c.namespace(t, "right"), c.namespace(t, "bare")
	for _, ns := range []string{left, right, bare} {
		c.sample(t, ns)
	}
	l, r := newLaptop(t, "left"), newLaptop(t, "right")
	l.withoutManager(t)
	l.managerIn(t, "team-left", left)
	r.managerIn(t, "team-right", right)
	c.clusterRights(t, "team-left")
	c.clusterRights(t, "team-right")

	t.Run("overlaps are refused", func(t *testing.T) {
		for want, set := range map[string]string{"the one in namespace team-right is for right already": "namespaces={right,bare}", "is for ": "manager.logLevel=info"} {
			res := l.try(t, "doppel", "helm", "install", "--manager-namespace", "team-third", "--set", set)
			if res.code == 0 || !strings.Contains(res.stderr, want) || !strings.Contains(res.stderr, "--manager-namespace") {
				t.Errorf("%s: %v", set, res)
			}
		}
	})

	l.run(t, "doppel", "connect", "--manager-namespace", "team-left", "-n", left)
	r.run(t, "doppel", "connect", "--manager-namespace", "team-right", "-n", right)
	l.colors(t, "blue", "127.0.0.1:3000")
	r.colors(t, "red", "127.0.0.1:3000")
	leftSvc, rightSvc := c.clusterIP(t, left, "dataprocessingservice"), c.clusterIP(t, right, "dataprocessingservice")
	t.Run("an intercept of each", func(t *testing.T) {
		want(t, l.run(t, "curl", "-s", "-m", "5", "dataprocessingservice:3000/color"), "green")
		want(t, l.run(t, "curl", "-s", "-m", "5", "dataprocessingservice."+left+":3000/color"), "green")
		var wg sync.WaitGroup
		for _, x := range []*laptop{l, r} {
			wg.Go(func() {
				if res := x.try(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000"); !strings.Contains(res.stdout, "State          : ACTIVE") {
					t.Errorf("%v", res)
				}
			})
		}
		wg.Wait()
		for _, x := range []*laptop{l, r} {
			if out := x.run(t, "doppel", "status"); strings.Contains(out, "Problem") {
				t.Errorf("problems: %s", out)
			}
		}
		for svc, color := range map[string]string{leftSvc: "blue", rightSvc: "red"} {
			if got := c.color(t, svc); got != color {
				t.Errorf("%s answers %q, want %s", svc, got, color)
			}
		}
	})
	t.Run("refuses outside", func(t *testing.T) {
		res := l.try(t, "doppel", "intercept", "verylargejavaservice", "-p", "3000", "-n", right)
		if res.code != 3 || !strings.Contains(res.stderr, "namespace right is not one of those that the traffic-manager in team-left is for (left)") {
			t.Errorf("%v", res)
		}
	})
	t.Run("one goes, the other stays", func(t *testing.T) {
		l.run(t, "doppel", "uninstall", "--everything", "--manager-namespace", "team-left")
		if got := c.color(t, leftSvc); got != "green" {
			t.Errorf("the app of the manager that went answers %q", got)
		}
		if got := c.color(t, rightSvc); got != "red" {
			t.Errorf("the other manager's intercept answers %q", got)
		}
		if !c.hasCRDs(t) {
			t.Fatal("the resource types went with a manager that was not the last")
		}
		want(t, r.run(t, "doppel", "list", "-n", right), "dataprocessingservice: intercepted")
	})
	t.Run("without policy and webhook", func(t *testing.T) { c.withheld(t, bare) })
	t.Run("the last one takes the resource types along", func(t *testing.T) {
		if got := c.color(t, rightSvc); got != "red" {
			t.Errorf("the intercept answers %q", got)
		}
		r.run(t, "doppel", "uninstall", "--everything", "--manager-namespace", "team-right")
		if c.hasCRDs(t) {
			t.Error("they are left")
		}
		c.empty(t, left)
	})
}

// withheld is an administrator of two namespaces who may bring nothing for the cluster.
func (c *cluster) withheld(t *testing.T, ns string) {
	const manager = "team-bare"
	c.namespace(t, manager)
	dev := newLaptop(t, "bare")
	dev.as = []string{"--user", "1000"}
	// What the cluster's administrator does once: doppel's resources are the namespaces' administrators' to give away.
	role := &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: "test-doppel-developers", Labels: map[string]string{"rbac.authorization.k8s.io/aggregate-to-admin": "true"}},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{"doppel.dev"}, Resources: []string{"*"}, Verbs: []string{"*"}}},
	}
	ok(c.core.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}))(t)
	t.Cleanup(func() {
		if err := c.core.RbacV1().ClusterRoles().Delete(context.Background(), role.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	kubeconfig := c.accountKubeconfig(t, manager, "dev")
	for _, in := range []string{manager, ns} {
		c.bindAccount(t, in, "ClusterRole", "admin", manager, "dev")
	}
	flags := []string{"--kubeconfig", kubeconfig, "--manager-namespace", manager}
	set := []string{"--set", "namespaces={" + ns + "}", "--set", "admission.policy=false", "--set", "admission.webhook=false"}
	eventually(t, 15*time.Second, func() error { // the roles are aggregated
		if res := dev.try(t, append(append([]string{"doppel", "connect", "-n", ns}, flags...), set...)...); res.code != 0 {
			return fmt.Errorf("connect, which installs: %v", res)
		}
		return nil
	})
	c.clusterRights(t, manager)
	want(t, dev.run(t, "curl", "-s", "-m", "5", "dataprocessingservice:3000/color"), "green")
	want(t, dev.run(t, "doppel", "status"), "admission.policy is false", "admission.webhook is false", "Reaches    : namespace "+ns)
	start := time.Now()
	res := dev.try(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000")
	if res.code == 0 || !strings.Contains(res.stderr, "admission.webhook") || time.Since(start) > 10*time.Second { // it has a minute, of which it needs none
		t.Errorf("an intercept, after %v: %v", time.Since(start), res)
	}
	pods := ok(c.core.CoreV1().Pods("right").List(t.Context(), metav1.ListOptions{LabelSelector: "app=verylargejavaservice"}))(t)
	if len(pods.Items) == 0 || pods.Items[0].Status.Phase != corev1.PodRunning {
		t.Fatal("no pod of another namespace")
	}
	if res := dev.try(t, "curl", "-s", "-m", "3", pods.Items[0].Status.PodIP+":8080"); res.code == 0 {
		t.Errorf("a pod of another namespace was reached: %v", res)
	}
	res = dev.try(t, append([]string{"doppel", "helm", "uninstall"}, flags...)...)
	if res.code != 0 || !strings.Contains(res.stderr, "the resource types of doppel stay") {
		t.Errorf("uninstall: %v", res)
	}
	dev.run(t, "doppel", "quit", "-s")
}

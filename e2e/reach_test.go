package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authn "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
)

// TestReach is a service account on a laptop, which has no rights but those that it gets here one after another.
func TestReach(t *testing.T) {
	c := theCluster(t)
	mine, other := c.namespace(t, "reach-mine"), c.namespace(t, "reach-other")
	c.sample(t, mine)
	c.sample(t, other)
	admin, l := newLaptop(t, "root"), newLaptop(t, "robot")
	l.as = []string{"--user", "1000"}
	admin.withoutManager(t)
	admin.run(t, "doppel", "helm", "install", "--set", "session.renewInterval=2s")
	kubeconfig := c.accountKubeconfig(t, mine, "robot")
	connect := []string{"doppel", "connect", "--kubeconfig", kubeconfig, "-n", mine}
	web := "http://verylargejavaservice." + mine + ":8080/"

	t.Run("without any right", func(t *testing.T) {
		r := l.try(t, connect...)
		if r.code != 3 || strings.Count(r.stderr, "doppel: error: ") != 1 || !strings.Contains(r.stderr, "you may not use doppel in namespace "+managerNS) {
			t.Fatalf("want one clear line: %v", r)
		}
	})
	c.bindAccount(t, managerNS, "Role", "doppel-connect", mine, "robot")
	t.Run("with doppel-connect alone", func(t *testing.T) {
		eventually(t, 10*time.Second, func() error {
			if r := l.try(t, connect...); r.code != 0 {
				return fmt.Errorf("%v", r)
			}
			return nil
		})
		want(t, l.run(t, "doppel", "status"), "User       : system:serviceaccount:"+mine+":robot", "Reaches    : nothing", "role doppel-reach")
		if r := l.try(t, "curl", "-s", "-m", "5", web); r.code == 0 {
			t.Errorf("a service was reached: %v", r)
		}
		l.run(t, "doppel", "quit")
	})
	binding := c.bindAccount(t, mine, "ClusterRole", "doppel-reach", mine, "robot")
	t.Run("with doppel-reach in one namespace", func(t *testing.T) {
		eventually(t, 10*time.Second, func() error {
			l.run(t, append(connect, "-o", "json")...)
			var st struct {
				Session struct{ Reach struct{ Namespaces []string } }
			}
			if err := json.Unmarshal([]byte(l.run(t, "doppel", "status", "-o", "json")), &st); err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprint(st.Session.Reach.Namespaces); got != "["+mine+"]" {
				l.run(t, "doppel", "quit")
				return fmt.Errorf("it reaches %s", got)
			}
			return nil
		})
		l.run(t, "curl", "-sf", "-m", "5", "-o", "/dev/null", web)
		pods, err := c.core.CoreV1().Pods(other).List(t.Context(), metav1.ListOptions{})
		if err != nil || len(pods.Items) == 0 {
			t.Fatal(pods, err)
		}
		for what, target := range map[string]string{
			"a service's address": c.clusterIP(t, other, "verylargejavaservice"),
			"a pod's address":     pods.Items[0].Status.PodIP + ":8080",
			"the API server":      c.clusterIP(t, "default", "kubernetes"),
			"the cluster's DNS":   c.clusterIP(t, "kube-system", "kube-dns"),
		} {
			if r := l.try(t, "curl", "-sk", "-m", "5", target); r.code != 7 { // 7: could not connect; 28 would be a time-out
				t.Errorf("%s (%s): %v", what, target, r)
			}
		}
		for _, name := range []string{"verylargejavaservice." + other, "verylargejavaservice." + other + ".svc", "verylargejavaservice." + other + ".svc.cluster.local"} {
			if r := l.try(t, "getent", "hosts", name); r.code == 0 {
				t.Errorf("%s has an address: %v", name, r)
			}
		}
	})
	t.Run("the right taken away", func(t *testing.T) {
		if err := c.core.RbacV1().RoleBindings(mine).Delete(t.Context(), binding, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 20*time.Second, func() error { // two renewals of 2 s, then a new session with what is left
			if r := l.try(t, "curl", "-s", "-m", "2", "-o", "/dev/null", web); r.code == 0 {
				return fmt.Errorf("still reached: %v", r)
			}
			return nil
		})
		eventually(t, 20*time.Second, func() error {
			if out := l.run(t, "doppel", "status"); !strings.Contains(out, "Reaches    : nothing") {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
	})
}

// accountKubeconfig makes a service account and a kubeconfig with a token of its own, which everybody on this machine can read.
func (c *cluster) accountKubeconfig(t *testing.T, ns, name string) string {
	t.Helper()
	sas := c.core.CoreV1().ServiceAccounts(ns)
	ok(sas.Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}))(t)
	tok := ok(sas.CreateToken(t.Context(), name, &authn.TokenRequest{}, metav1.CreateOptions{}))(t)
	cfg := ok(clientcmd.LoadFromFile(c.kubeconfig))(t)
	for _, u := range cfg.AuthInfos {
		u.ClientCertificateData, u.ClientKeyData, u.Token = nil, nil, tok.Status.Token
	}
	b := ok(clientcmd.Write(*cfg))(t)
	dir, err := os.MkdirTemp("", "doppel-account-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	file := filepath.Join(dir, "config")
	for _, err := range []error{os.Chmod(dir, 0o755), os.WriteFile(file, b, 0o600), os.Chmod(file, 0o644)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return file
}

// bindAccount gives a service account a role in a namespace and returns the binding's name.
func (c *cluster) bindAccount(t *testing.T, ns, kind, role, accountNS, account string) string {
	t.Helper()
	b := ok(c.core.RbacV1().RoleBindings(ns).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "reach-test-"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: kind, Name: role},
		Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: accountNS, Name: account}},
	}, metav1.CreateOptions{}))(t)
	return b.Name
}

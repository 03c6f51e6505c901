package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"
)

// backLimit bounds how long the laptop may take to be back after what was away has returned. The target is one second, which is
// logged; other builds on the machine must not fail the test.
const backLimit = 6 * time.Second

// TestSessionsLast takes away, one after the other, what a session needs, while a connection idles and a download runs.
func TestSessionsLast(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "lasting")
	c.sample(t, ns)
	l := newLaptop(t, "roamer")
	l.run(t, "doppel", "connect", "-n", ns)
	// The node's end of the pods' links has an address that pods reach and the laptop only through the manager.
	const server = "10.244.1.1:7007"
	startLines(t, c.onNode, "serve", "0.0.0.0:7007")
	session := l.sessionUID(t)
	svc := "dataprocessingservice." + ns + ":3000/color"

	// back checks that all works again without a command, and how soon.
	back := func(t *testing.T, what string, since time.Time, keep *lines) {
		t.Helper()
		keep.more(t, 1, backLimit)
		t.Logf("%s: the idle connection answered %v after the return", what, time.Since(since).Round(time.Millisecond))
		want(t, l.run(t, "curl", "-s", "-m", "5", svc), "green")
		t.Logf("%s: a new connection by name answered %v after the return", what, time.Since(since).Round(time.Millisecond))
		if got := l.sessionUID(t); got != session {
			t.Errorf("%s: session %s became %s", what, session, got)
		}
	}

	t.Run("link and address", func(t *testing.T) {
		keep, fetch := startLines(t, l.command, "keep", server), startLines(t, l.command, "fetch", server)
		l.link(t, "down")
		keep.quiet(t)
		gw := strings.TrimSpace(l.sh(t, "ip -4 route show default | cut -d' ' -f3"))
		net := gw[:strings.LastIndex(gw, ".")]
		l.sh(t, "ip -4 addr flush dev eth0; ip addr add "+net+".77/24 dev eth0; ip route add default via "+gw)
		l.link(t, "up")
		up := time.Now()
		l.online(t)
		t.Logf("the network itself was back %v after the link was set up", time.Since(up).Round(time.Millisecond)) // the kernel takes up to a second (link_watch.c)
		back(t, "link down, up with another address", time.Now(), keep)
		eventually(t, 30*time.Second, func() error {
			if s := fetch.last(); s != "complete: EOF" {
				return fmt.Errorf("the download: %s", s)
			}
			return nil
		})
		keep.more(t, 3, backLimit)
	})

	t.Run("asleep", func(t *testing.T) {
		keep := startLines(t, l.command, "keep", server)
		l.sh(t, "pkill -STOP -x doppel-rootd; pkill -STOP -f '[d]oppel daemon'")
		keep.quiet(t)
		l.link(t, "down") // the bag
		l.link(t, "up")
		l.sh(t, "pkill -CONT -f '[d]oppel daemon'; pkill -CONT -x doppel-rootd")
		back(t, "daemons stopped", time.Now(), keep)
	})

	t.Run("API server", func(t *testing.T) {
		keep := startLines(t, l.command, "keep", server)
		c.restartAPI(t)
		back(t, "API server restarted", time.Now(), keep)
	})

	t.Run("manager upgraded", func(t *testing.T) {
		keep := startLines(t, l.command, "keep", server)
		patch := fmt.Sprintf(`{"spec":{"template":{"metadata":{"annotations":{"upgraded":%q}}}}}`, time.Now())
		if _, err := c.core.AppsV1().Deployments(managerNS).Patch(t.Context(), "traffic-manager", types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		c.available(t, managerNS, "traffic-manager")
		// Its connections ended with the old pod: the application is told so, and does not hang.
		eventually(t, backLimit, func() error {
			if s := keep.last(); !strings.HasPrefix(s, "ended") {
				return fmt.Errorf("a connection through the old manager: %s", s)
			}
			return nil
		})
		want(t, keep.last(), "connection reset by peer")
		back(t, "manager upgraded", time.Now(), startLines(t, l.command, "keep", server))
	})

	// The laptop sleeps for longer than the manager keeps its session: it gets another one, with its intercepts.
	t.Run("asleep for longer than the session", func(t *testing.T) {
		l.run(t, "doppel", "helm", "upgrade", "--set", "session.lostGrace=2s")
		t.Cleanup(func() { l.run(t, "doppel", "helm", "upgrade", "--set", "session.lostGrace=30s") })
		l.colors(t, "blue", "127.0.0.1:3000")
		files := filepath.Join(t.TempDir(), "files")
		l.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--mount", files)
		mounted := func() error {
			if r := l.try(t, "cat", files+"/var/run/secrets/kubernetes.io/serviceaccount/namespace"); r.stdout != ns {
				return fmt.Errorf("the app's files: %v", r)
			}
			return nil
		}
		if err := mounted(); err != nil {
			t.Error(err)
		}
		addr := c.clusterIP(t, ns, "dataprocessingservice")
		keep := startLines(t, l.command, "keep", server)
		old := l.sessionUID(t)
		l.sh(t, "pkill -STOP -x doppel-rootd; pkill -STOP -f '[d]oppel daemon'")
		l.link(t, "down")
		if out, err := c.lab("restart", "kube-apiserver"); err != nil { // the manager notices at once instead of by three pings in a minute
			t.Fatalf("%v\n%s", err, out)
		}
		eventually(t, 90*time.Second, func() error { return c.none(t, "namespaces/"+managerNS+"/sessions") })
		l.link(t, "up")
		l.sh(t, "pkill -CONT -f '[d]oppel daemon'; pkill -CONT -x doppel-rootd")
		woken := time.Now()
		eventually(t, backLimit, func() error {
			if s := keep.last(); !strings.HasPrefix(s, "ended") {
				return fmt.Errorf("a connection of the old session: %s", s)
			}
			return nil
		})
		t.Logf("connections of the old session were reset %v after waking up", time.Since(woken).Round(time.Millisecond))
		eventually(t, backLimit, func() error {
			if r := l.try(t, "curl", "-s", "-m", "2", svc); !strings.Contains(r.stdout, "blue") {
				return fmt.Errorf("the service by name: %v", r)
			}
			return nil
		})
		eventually(t, backLimit, func() error { return c.is(t, addr, "blue") })
		t.Logf("the intercept was back %v after waking up", time.Since(woken).Round(time.Millisecond))
		eventually(t, backLimit, mounted)
		if l.sessionUID(t) == old {
			t.Error("it is the old session")
		}
	})

	eventually(t, backLimit, func() error { // the manager that led before the last upgrade may be about to end
		if out := l.run(t, "doppel", "status"); !strings.Contains(out, "Tunnel     : up") {
			return errors.New(out)
		}
		return nil
	})
	l.run(t, "doppel", "quit", "-s")
}

// restartAPI kills the API server and starts it again; it returns when that answers, and when it was killed.
func (c *cluster) restartAPI(t *testing.T) (struck time.Time) {
	t.Helper()
	const server = "kube-apiserver"
	if out, err := c.lab("restart", server); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	struck = time.Now()
	answers := false
	defer func() {
		if !answers {
			status, _ := c.lab("status") // which says what does not run, by an exit code too
			t.Logf("%sThe end of the log of %s:\n%s", status, server, c.node(t, "tail", "-n", "40", "/var/lib/doppel-lab/"+labName+"/log/"+server+".log"))
		}
	}()
	eventually(t, time.Minute, func() error {
		_, err := c.core.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(t.Context())
		return err
	})
	answers = true
	return struck
}

// online returns when the laptop reaches the API server, whatever doppel does.
func (l *laptop) online(t *testing.T) {
	t.Helper()
	cfg, err := clientcmd.BuildConfigFromFlags("", l.c.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ := strings.Cut(strings.TrimPrefix(cfg.Host, "https://"), ":")
	l.sh(t, "until nc -z -w 1 "+host+" "+port+"; do sleep 0.02; done")
}

func (l *laptop) link(t *testing.T, state string) {
	t.Helper()
	if out, err := l.c.lab("laptop", "link", l.name, state); err != nil {
		t.Fatalf("link %s: %v\n%s", state, err, out)
	}
}

// sessionUID is the session that the laptop says it has.
func (l *laptop) sessionUID(t *testing.T) string {
	t.Helper()
	var st struct {
		Session struct {
			UID string `json:"uid"`
		} `json:"session"`
	}
	if err := json.Unmarshal([]byte(l.run(t, "doppel", "status", "-o", "json")), &st); err != nil || st.Session.UID == "" {
		t.Fatalf("status: %v", err)
	}
	return st.Session.UID
}

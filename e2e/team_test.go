package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// TestTeam is two people who take different requests of one service, and a third caller who notices nothing.
func TestTeam(t *testing.T) {
	c := theCluster(t)
	ns := c.namespace(t, "team")
	c.sample(t, ns)
	louise, mary := newLaptop(t, "louise"), newLaptop(t, "mary")
	louise.run(t, "doppel", "connect", "-n", ns)
	mary.run(t, "doppel", "connect", "-n", ns)
	louise.colors(t, "blue", "127.0.0.1:3000")
	mary.colors(t, "orange", "127.0.0.1:3000")
	svc := "http://" + c.clusterIP(t, ns, "dataprocessingservice") + "/color"
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// ask sends requests over one connection, each with the header of one person or none.
	ask := func(how string, people ...string) string {
		t.Helper()
		out, err := c.lab("node", "exec", "--", "env", envHelper+"=people", self, how+" "+svc+" "+strings.Join(people, " "))
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return strings.TrimSpace(out)
	}

	out := louise.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--http-match=blog-demo-id=louise")
	want(t, out, "State          : ACTIVE", "Intercepting   : HTTP requests that match all of:\n", `header("blog-demo-id") ~= regexp("louise")`)
	mary.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--http-match=blog-demo-id=mary")
	for _, how := range []string{"http1", "http2"} {
		if got := ask(how, "louise", "nobody", "mary", "louise", "mary", "nobody"); got != "blue green orange blue orange green" {
			t.Errorf("%s: %s", how, got)
		}
	}
	want(t, mary.run(t, "doppel", "list"), `regexp("louise")`, `regexp("mary")`)
	out = mary.run(t, "doppel", "why", "dataprocessingservice")
	want(t, out, `header("blog-demo-id") == "louise"  the laptop of admin (dataprocessingservice since `, `header("blog-demo-id") == "mary"    this laptop (`, "3.  everything else",
		"GET /color  the laptop of admin\n", "GET /color  this laptop\n", "GET /color  the app: no rule took it\n")
	want(t, mary.run(t, "doppel", "why", "dataprocessingservice", "-H", "blog-demo-id: louise"), "GET / on port 3000 goes to the laptop of admin:\n", "yes\n")
	want(t, mary.run(t, "doppel", "why", "dataprocessingservice", "-H", "blog-demo-id: jean"), "GET / on port 3000 goes to the app:\n")

	// The same requests, or some of both, are refused with the holder's name.
	r := mary.try(t, "doppel", "intercept", "mine", "-w", "dataprocessingservice", "-p", "3001", "--http-header=blog-demo-id=louise")
	want(t, r.stderr, "is intercepted for requests with", "by admin (intercept dataprocessingservice since")
	r = mary.try(t, "doppel", "intercept", "mine", "-w", "dataprocessingservice", "-p", "3001", "--http-method=GET")
	want(t, r.stderr, "is intercepted for requests with", "by admin")
	// All that is left can still be taken: the more specific ones win.
	mary.colors(t, "red", "127.0.0.1:3001")
	mary.run(t, "doppel", "intercept", "rest", "-w", "dataprocessingservice", "-p", "3001")
	if got := ask("http1", "nobody", "louise", "mary"); got != "red blue orange" {
		t.Errorf("with one intercept of all: %s", got)
	}
	louise.run(t, "doppel", "intercept", "none", "-w", "dataprocessingservice", "-p", "3002", "--http-match=blog-demo-id=jean")
	if got := ask("http1", "jean"); got != "green" {
		t.Errorf("of a laptop on which nobody listens: %s", got)
	}
	want(t, louise.run(t, "doppel", "why", "none", "--last", "1"), "the app: the laptop did not take it: ")
	louise.run(t, "doppel", "leave", "none")
	mary.run(t, "doppel", "leave", "rest")

	louise.run(t, "doppel", "leave", "dataprocessingservice")
	if got := ask("http1", "louise", "mary", "nobody"); got != "green orange green" {
		t.Errorf("after one has left: %s", got)
	}

	// Whose intercept is ended by somebody is told by whom.
	louise.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--http-match=blog-demo-id=mary", "--takeover")
	if got := ask("http1", "louise", "mary", "nobody"); got != "green blue green" {
		t.Errorf("after a takeover: %s", got)
	}
	want(t, mary.run(t, "doppel", "status"), "intercept dataprocessingservice has ended: port 3000 of dataprocessingservice was taken over by admin at ")
	mary.run(t, "doppel", "intercept", "dataprocessingservice", "-p", "3000", "--http-match=blog-demo-id=jean")
	if err := c.core.Discovery().RESTClient().Delete().AbsPath("/apis/doppel.dev/v1alpha1/namespaces/" + ns + "/intercepts").Do(t.Context()).Error(); err != nil {
		t.Fatal(err)
	}
	for _, l := range []*laptop{louise, mary} {
		eventually(t, 5*time.Second, func() error {
			if out := l.run(t, "doppel", "status"); !strings.Contains(out, "intercept dataprocessingservice has ended: it was removed in the cluster at ") {
				return errors.New(out)
			}
			return nil
		})
	}
	mary.run(t, "doppel", "quit", "-s")

	// What somebody declares in the cluster waits for a laptop of theirs that accepts it, and outlives its session.
	declared := fmt.Appendf(nil, `{"apiVersion": "doppel.dev/v1alpha1", "kind": "Intercept", "metadata": {"name": "declared", "namespace": %q}, "spec": {
		"user": "admin", "name": "declared", "workload": {"kind": "Deployment", "name": "dataprocessingservice"}, "ports": [{"target": "127.0.0.1:3000"}]}}`, ns)
	apply := func() {
		t.Helper()
		path := "/apis/doppel.dev/v1alpha1/namespaces/" + ns + "/intercepts/declared"
		if err := c.core.Discovery().RESTClient().Patch(types.ApplyPatchType).AbsPath(path).Param("fieldManager", "kubectl").Body(declared).Do(t.Context()).Error(); err != nil {
			t.Fatal(err)
		}
	}
	apply()
	apply() // again changes nothing
	eventually(t, 5*time.Second, func() error {
		if out := louise.run(t, "doppel", "list"); !strings.Contains(out, "waiting for admin to connect with --accept-intercepts") {
			return errors.New(out)
		}
		return nil
	})
	louise.run(t, "doppel", "quit")
	for range 2 {
		louise.run(t, "doppel", "connect", "-n", ns, "--accept-intercepts")
		eventually(t, 10*time.Second, func() error {
			if got := ask("http1", "nobody"); got != "blue" {
				return fmt.Errorf("the declared intercept: %s", got)
			}
			return nil
		})
		eventually(t, 5*time.Second, func() error { // agents know it a moment before it is said to be active
			if out := louise.run(t, "doppel", "list", "-i"); !strings.Contains(out, "State          : ACTIVE") {
				return errors.New(out)
			}
			return nil
		})
		want(t, louise.run(t, "doppel", "list", "-i"), "Intercept name : declared", "State          : ACTIVE", "Destination    : 127.0.0.1:3000")
		louise.run(t, "doppel", "quit")
		eventually(t, 5*time.Second, func() error {
			if got := ask("http1", "nobody"); got != "green" {
				return fmt.Errorf("after quit: %s", got)
			}
			return nil
		})
	}
	louise.run(t, "doppel", "connect", "-n", ns, "--accept-intercepts")
	eventually(t, 10*time.Second, func() error {
		if r := louise.try(t, "doppel", "leave", "declared"); r.code != 0 {
			return fmt.Errorf("%v", r)
		}
		return nil
	})
	if got := ask("http1", "louise", "mary", "nobody"); got != "green green green" {
		t.Errorf("after both have left: %s", got)
	}
}

// peopleHelper asks a URL once for each person, over one connection: "http1|http2 URL PERSON...".
func peopleHelper(arg string) int {
	f := strings.Fields(arg)
	tr := &http.Transport{MaxConnsPerHost: 1, Protocols: new(http.Protocols)}
	tr.Protocols.SetHTTP1(f[0] == "http1")
	tr.Protocols.SetUnencryptedHTTP2(f[0] == "http2")
	client := &http.Client{Transport: tr, Timeout: 5 * time.Second}
	for _, person := range f[2:] {
		req, err := http.NewRequest(http.MethodGet, f[1], nil)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 2
		}
		req.Header.Set("Blog-Demo-Id", person)
		resp, err := client.Do(req)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		b, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		fmt.Print(strings.Trim(strings.TrimSpace(string(b)), `"`), " ")
	}
	return 0
}

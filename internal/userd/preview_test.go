package userd

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/uerr"
)

var somePreview = localapi.Preview{ID: "abcdefghijklmnop", Ingress: localapi.Ingress{Host: "web.shop", Port: 80, L5Host: "shop.example"}}

// created waits for an object and returns its spec.
func (c *cluster) created(name string) v1alpha1.InterceptSpec {
	c.t.Helper()
	c.until(name+" is created", func() bool { return strings.Contains(c.names(), name) })
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.intercepts[name].Spec
}

// What an intercept with a preview takes is the preview's requests, besides what its user has asked for.
func TestPreviewOfNew(t *testing.T) {
	user := match.Rule{Headers: []match.Header{{Name: "x-user", Text: match.Text{Op: match.Equal, Value: "lou"}}}}
	for name, tt := range map[string]struct {
		req   localapi.InterceptRequest
		rules int
		all   bool
	}{
		"alone": {localapi.InterceptRequest{Preview: &somePreview}, 1, false},
		"match": {localapi.InterceptRequest{Preview: &somePreview, Match: user}, 2, false},
		"all":   {localapi.InterceptRequest{Preview: &somePreview, All: true}, 2, true},
		"none":  {localapi.InterceptRequest{All: true}, 1, true},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			s := c.connect()
			tt.req.Name, tt.req.Ports = "web", []string{"3000"}
			done := create(t.Context(), s, tt.req)
			spec := c.created("intercepts-2")
			c.say("intercepts-2", "Active", "", "")
			o := <-done
			rules := spec.Rules()
			if o.err != nil || len(rules) != tt.rules || rules[len(rules)-1].IsZero() != tt.all {
				t.Errorf("%v, %v", rules, o.err)
			}
			if want := name != "none"; (o.in.Preview == somePreview.ID) != want || want && (o.in.All != tt.all || spec.Preview.Ingress.L5Host != "shop.example") {
				t.Errorf("%+v", o.in)
			}
		})
	}
}

// An intercept that is there gets a preview, and keeps what it took; if that does not come about, it is as before.
func TestPreviewOfOld(t *testing.T) {
	c := newCluster(t)
	s := c.connect()
	done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}})
	c.created("intercepts-2")
	c.say("intercepts-2", "Active", "", "")
	if o := <-done; o.err != nil {
		t.Fatal(o.err)
	}
	add := func(name string) chan outcome {
		done := make(chan outcome, 1)
		go func() {
			var o outcome
			o.in, o.err = s.intercepts.addPreview(t.Context(), localapi.PreviewRequest{Name: name, Preview: somePreview}, func(string, ...any) {})
			done <- o
		}()
		return done
	}
	wantError(t, (<-add("nope")).err, uerr.NotFound, "no intercept", "doppel list -i")

	done = add("web")
	if spec := c.created("intercepts-3"); spec.Preview == nil || spec.HTTP == nil || !spec.HTTP.Rule().IsZero() || spec.Ports[0].Target != "127.0.0.1:3000" {
		t.Errorf("%+v", spec)
	}
	c.say("intercepts-3", "Active", "", "")
	if o := <-done; o.err != nil || o.in.Preview != somePreview.ID || !o.in.All {
		t.Errorf("%+v, %v", o.in, o.err)
	}
	if got := c.names(); got != "intercepts-3 sessions-1" {
		t.Errorf("there is %s", got)
	}

	done = add("web")
	c.created("intercepts-4")
	c.say("intercepts-4", "Failed", "PreviewHeld", "the preview is that of an intercept of eve")
	if spec := c.created("intercepts-5"); spec.Preview == nil || spec.HTTP == nil { // what it was: with the preview from before
		t.Errorf("%+v", spec)
	}
	c.say("intercepts-5", "Active", "", "")
	wantError(t, (<-done).err, uerr.Cluster, "of eve", "")
	if list, _ := s.intercepts.all(); len(list) != 1 || list[0].State != "ACTIVE" {
		t.Errorf("%+v", list)
	}
	if err := leave(t, s, "web"); err != nil {
		t.Fatal(err)
	}
}

// The relay is the one that the manager tells of, which may take a moment when a session has begun.
func TestRelay(t *testing.T) {
	c := newCluster(t)
	c.mute = true
	s := c.connect()
	d := &Daemon{sessions: []*session{s}}
	ask := func() localapi.RelayResult {
		r, err := d.relay(t.Context(), localapi.RelayRequest{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if r, err := d.relay(soon, localapi.RelayRequest{}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("before the manager has said anything: %+v, %v", r, err)
	}
	c.set(func() { c.mute = false })
	if r := ask(); r.URL != "" || r.Namespace != "shop" {
		t.Errorf("%+v", r)
	}
	c.set(func() { c.relay = &control.Relay{URL: "https://relay.test", Cluster: "c1", Problem: "HTTP 401"} })
	c.until("the relay is known", func() bool { return ask().URL != "" })
	if r := ask(); r.URL != "https://relay.test" || r.Cluster != "c1" || r.Problem != "HTTP 401" {
		t.Errorf("%+v", r)
	}
}

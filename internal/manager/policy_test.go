package manager

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

func TestPolicyCheck(t *testing.T) {
	resource := schema.GroupResource{Group: "doppel.dev", Resource: "sessions"}
	for name, tt := range map[string]struct {
		answer  error
		want    string // "" is: in force
		missing bool
	}{
		"refused by the policy":           {refusedByPolicy(), "", false},
		"refused by the policy, invalid":  {apierrors.NewInvalid(schema.GroupKind{}, "x", nil), "check the admission policy", false},
		"accepted":                        {nil, "not in force: a forged *v1alpha1.Session was accepted", true},
		"the manager may not create":      {refusedByRBAC(), "check the admission policy", false},
		"another policy":                  {apierrors.NewForbidden(resource, "", errors.New("ValidatingAdmissionPolicy 'no-alpha' denied request: no")), "check the admission policy", false},
		"quota":                           {apierrors.NewForbidden(resource, "", errors.New("exceeded quota")), "check the admission policy", false},
		"the resource is unknown":         {apierrors.NewNotFound(resource, ""), "check the admission policy", false},
		"the API server does not respond": {context.DeadlineExceeded, "check the admission policy", false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.policyErr = tt.answer
			err := w.policy.check(t.Context())
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if errors.Is(err, errNoPolicy) != tt.missing {
				t.Errorf("policy known to be missing: %v", !tt.missing)
			}
			if p := w.policy.problem(); (p == "") != (err == nil) {
				t.Errorf("problem %q", p)
			}
		})
	}
}

// A policy for sessions alone is not enough.
func TestPolicyForInterceptsToo(t *testing.T) {
	w := newWorld(t)
	w.policyErr = nil
	w.fail = func(verb string, o runtime.Object) error {
		if _, ok := o.(*v1alpha1.Session); ok && verb == "create" {
			return refusedByPolicy()
		}
		return nil
	}
	if err := w.policy.check(t.Context()); !errors.Is(err, errNoPolicy) || !strings.Contains(err.Error(), "Intercept") {
		t.Errorf("got %v", err)
	}
}

// Where reach is checked, its policy has to be in force as well.
func TestPolicyForReach(t *testing.T) {
	w := newWorld(t)
	w.policy.checkReach = true
	for name, tt := range map[string]struct {
		answer error
		want   string
	}{
		"refused by the policy": {refusedByReach(), ""},
		"accepted":              {nil, "not in force"},
		"refused by another":    {refusedByPolicy(), "check the admission policy"},
	} {
		w.set(func() { w.reachErr = tt.answer })
		err := w.policy.check(t.Context())
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", name, err, tt.want)
		}
	}
}

// A result is good for a second; whoever asks later waits for a new one. Changes are told.
func TestPolicyOK(t *testing.T) {
	w := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		changes := 0
		p := &policyProbe{client: w.kc, namespace: "doppel", log: w.cfg.Log, onChange: func() { changes++ }, err: errors.New("not checked")}
		ctx := context.Background()
		if err := p.ok(ctx); err != nil || changes != 1 {
			t.Errorf("first: %v, %d changes", err, changes)
		}
		w.set(func() { w.policyErr = nil })
		if err := p.ok(ctx); err != nil {
			t.Errorf("within a second: %v", err)
		}
		time.Sleep(time.Second)
		if err := p.ok(ctx); !errors.Is(err, errNoPolicy) || changes != 2 {
			t.Errorf("after a second: %v, %d changes", err, changes)
		}
		w.set(func() { w.policyErr = refusedByPolicy() })
		rctx, cancel := context.WithCancel(ctx)
		done := make(chan error)
		go func() { done <- p.run(rctx) }()
		time.Sleep(policyInterval + time.Second)
		if err := p.ok(ctx); err != nil || changes != 3 {
			t.Errorf("while run looks: %v, %d changes", err, changes)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
}

// Who has no time left does not spoil the result for others.
func TestPolicyOfTheHasty(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p := &policyProbe{client: w.kc, namespace: "doppel", log: w.cfg.Log, onChange: func() {}, err: errors.New("not checked")}
	_ = p.ok(ctx)
	if err := p.ok(t.Context()); err != nil {
		t.Error(err)
	}
}

// Many who connect at once after a while cause one check.
func TestPolicyRenewedOnce(t *testing.T) {
	w := newWorld(t)
	var checks atomic.Int32
	w.fail = func(verb string, o runtime.Object) error {
		if _, ok := o.(*v1alpha1.Intercept); ok && verb == "create" {
			checks.Add(1)
		}
		return nil
	}
	synctest.Test(t, func(t *testing.T) {
		for n := int32(1); n <= 2; n++ {
			var all sync.WaitGroup
			for range 20 {
				all.Go(func() {
					if err := w.policy.ok(t.Context()); err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait()
			if got := checks.Load(); got != n {
				t.Errorf("%d checks, want %d", got, n)
			}
			time.Sleep(2 * time.Second) // of the bubble
		}
	})
}

package manager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

// policyInterval is how often the manager tries a forged session.
const policyInterval = time.Minute

// policyRule is one of our admission policies: what begins its name, which the API server's refusal says, and words from the message of the
// rule that matters; a policy that lost it refuses the probe for another reason at most.
type policyRule struct{ policy, message string }

var (
	identityRule = policyRule{"ValidatingAdmissionPolicy 'doppel-identity-", "must be the name by which this cluster knows you"}
	reachRule    = policyRule{"ValidatingAdmissionPolicy 'doppel-reach-", "needs the right to connect to networks.doppel.dev there"}
)

// refused says whether it was the policy itself that refused something; a missing right, a quota or another policy says nothing about ours.
func (r policyRule) refused(err error) bool {
	return (apierrors.IsForbidden(err) || apierrors.IsInvalid(err)) && strings.Contains(err.Error(), r.policy) && strings.Contains(err.Error(), r.message)
}

// policyGrace is how long a manager that has just started waits for the policy before it says that it is ready all the same:
// laptops shall hear then why they are refused.
const policyGrace = 10 * time.Second

// forgedUser is nobody: a session that claims this user must be refused by the admission policy.
const forgedUser = "doppel:policy-probe"

// errNoPolicy means that the policy is not in force.
var errNoPolicy = errors.New("the admission policy is not in force")

// policyProbe knows whether the admission policy that ties objects to their creator is in force (D2).
// It tries what the policy forbids, as a dry run; without the policy no new session is accepted.
type policyProbe struct {
	client     client.Client
	namespace  string
	checkReach bool
	off        bool // there is none, and nothing that needs one is done
	log        *slog.Logger
	onChange   func()     // called when the policy came into force or left it
	renewing   sync.Mutex // held by the one that renews a result for all who wait for it

	mu sync.Mutex
	// guarded by mu
	err     error
	checked time.Time
	seen    bool // the policy has been in force
}

func newPolicyProbe(cm ctrl.Manager, cfg Config, onChange func()) *policyProbe {
	return &policyProbe{
		client: cm.GetClient(), namespace: cfg.Namespace, checkReach: cfg.CheckReach, off: cfg.NoPolicy, log: cfg.Log, onChange: onChange,
		err: fmt.Errorf("the admission policy has not been checked yet"),
	}
}

func (p *policyProbe) run(ctx context.Context) error {
	if p.off {
		return nil
	}
	started := time.Now()
	for {
		wait := policyInterval
		switch err := p.check(ctx); {
		case err != nil && time.Since(started) < policyGrace:
			wait = 100 * time.Millisecond // a fresh policy needs a moment to reach every API server
		case err != nil:
			p.log.Error("new sessions are refused", "err", err)
			wait = time.Second
		}
		p.mu.Lock()
		p.seen = p.seen || p.err == nil || time.Since(started) >= policyGrace
		p.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// check tries what the policies forbid and remembers the outcome.
func (p *policyProbe) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := p.refused(ctx, probeSession(p.namespace, forgedUser), identityRule)
	if err == nil {
		err = p.refused(ctx, &v1alpha1.Intercept{
			ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, GenerateName: "policy-probe-"},
			Spec:       v1alpha1.InterceptSpec{User: forgedUser, Session: "probe", Name: "probe", Workload: v1alpha1.WorkloadRef{Kind: "Deployment", Name: "probe"}},
		}, identityRule)
	}
	if err == nil && p.checkReach { // the manager itself has the right to connect to nothing
		greedy := probeSession(p.namespace, "system:serviceaccount:"+p.namespace+":"+objectName)
		greedy.Spec.Reach.Namespaces = []string{p.namespace}
		err = p.refused(ctx, greedy, reachRule)
	}
	p.mu.Lock()
	changed := (p.err == nil) != (err == nil)
	p.err, p.checked = err, time.Now()
	p.mu.Unlock()
	if changed {
		p.onChange()
	}
	return err
}

// probeSession is a session that is only ever created as a dry run.
func probeSession(namespace, user string) *v1alpha1.Session {
	return &v1alpha1.Session{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, GenerateName: "policy-probe-"},
		Spec:       v1alpha1.SessionSpec{User: user, Key: "sha256:probe", RenewTime: metav1.NowMicro()},
	}
}

// refused is nil if the API server refuses the forged object by the rule.
func (p *policyProbe) refused(ctx context.Context, o client.Object, rule policyRule) error {
	err := p.client.Create(ctx, o, client.DryRunAll)
	switch {
	case err == nil:
		return fmt.Errorf("%w: a forged %T was accepted", errNoPolicy, o)
	case rule.refused(err):
		return nil
	}
	return fmt.Errorf("check the admission policy: %w", err)
}

// settled says whether the policy has been in force once, or was waited for in vain. Later on a missing policy is no reason to take
// the manager out of its service: those who are connected stay.
func (p *policyProbe) settled() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.off || p.seen
}

// problem is the latest outcome in words, or "".
func (p *policyProbe) problem() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.off || p.err == nil {
		return ""
	}
	return "new sessions are refused: " + p.err.Error()
}

// ok is nil while the policy is in force. A result older than a second is renewed, so that a session is never accepted on old news.
func (p *policyProbe) ok(ctx context.Context) error {
	if p.off {
		return nil
	}
	if err, fresh := p.fresh(); fresh {
		return err
	}
	p.renewing.Lock()
	defer p.renewing.Unlock()
	if err, fresh := p.fresh(); fresh {
		return err
	}
	return p.check(context.WithoutCancel(ctx)) // it is for all who wait
}

func (p *policyProbe) fresh() (err error, fresh bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err, time.Since(p.checked) < time.Second
}

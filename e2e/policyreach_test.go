package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	authn "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

// reaching is an honest session of p but for its reach.
func reaching(p person, outside bool, namespaces ...string) *unstructured.Unstructured {
	o := object("Session", p)
	list := make([]any, len(namespaces))
	for i, ns := range namespaces {
		list[i] = ns
	}
	o.Object["spec"].(map[string]any)["reach"] = map[string]any{"namespaces": list, "outside": outside}
	return o
}

// reach checks the policies that ask what a session may reach. user has the chart's roles: doppel-connect, and doppel-intercept in workNS.
func (w *policyWorld) reach(t *testing.T) {
	ctx := t.Context()
	if s, err := w.user.sessions().Create(ctx, reaching(w.user, true, "*"), metav1.CreateOptions{}); err != nil {
		t.Fatalf("without the policy it fails too, so a refusal shows nothing: %v", err)
	} else if err := w.user.sessions().Delete(ctx, s.GetName(), metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	boss := w.admin
	boss.name = ok(w.core.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authn.SelfSubjectReview{}, metav1.CreateOptions{}))(t).Status.UserInfo.Username
	w.apply(t, "policy-reach.yaml")
	defer w.remove(t, "policy-reach.yaml")
	full := func(bad int) []string { // as many namespaces as there is room for, one of them out of reach
		list := slices.Repeat([]string{workNS}, v1alpha1.MaxReach)
		if bad >= 0 {
			list[bad] = otherNS
		}
		return list
	}
	dryRun := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	refused := func(p person, o *unstructured.Unstructured, want string) error {
		_, err := p.sessions().Create(ctx, o, dryRun)
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "ValidatingAdmissionPolicy 'doppel-reach-") || !strings.Contains(err.Error(), want) {
			return fmt.Errorf("got %w, want a refusal with %q", err, want)
		}
		return nil
	}
	eventually(t, 30*time.Second, func() error { // until all eight are in force
		for part := range 8 {
			if err := refused(w.user, reaching(w.user, false, full(part*26)...), "needs the right to connect"); err != nil {
				return err
			}
		}
		return nil
	})
	for name, tt := range map[string]struct {
		o    *unstructured.Unstructured
		want string
	}{
		"another namespace":                    {reaching(w.user, false, otherNS), "needs the right to connect to networks.doppel.dev there"},
		"one's own and another":                {reaching(w.user, false, workNS, otherNS), "networks.doppel.dev there"},
		"a namespace that does not exist":      {reaching(w.user, false, "nowhere"), "networks.doppel.dev there"},
		"everything":                           {reaching(w.user, false, "*"), "in the whole cluster"},
		"everything, hidden among one's own":   {reaching(w.user, false, workNS, "*"), "stands alone"},
		"no name, which would be every one":    {reaching(w.user, false, workNS, ""), "networks.doppel.dev there"},
		"nodes and what is beyond the cluster": {reaching(w.user, true, workNS), "outside.doppel.dev"},
		"the administrator hides everything":   {reaching(boss, false, "a", "*"), "stands alone"},
	} {
		p := w.user
		if strings.HasPrefix(name, "the administrator") {
			p = boss
		}
		if err := refused(p, tt.o, tt.want); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, bad := range []int{1, 2, 25, 51, 77, 206, 207} {
		if err := refused(w.user, reaching(w.user, false, full(bad)...), "needs the right"); err != nil {
			t.Errorf("number %d: %v", bad, err)
		}
	}
	for name, create := range map[string]func() error{
		"nothing": func() error { _, err := w.user.sessions().Create(ctx, object("Session", w.user), dryRun); return err },
		"one's own": func() error {
			_, err := w.user.sessions().Create(ctx, reaching(w.user, false, workNS), dryRun)
			return err
		},
		"everything, for an administrator": func() error {
			_, err := boss.sessions().Create(ctx, reaching(boss, true, "*"), dryRun)
			return err
		},
	} {
		if err := create(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	start := time.Now()
	if _, err := w.user.sessions().Create(ctx, reaching(w.user, false, full(-1)...), dryRun); err != nil {
		t.Errorf("%d namespaces: %v", v1alpha1.MaxReach, err) // in particular: within the API server's cost limits
	}
	t.Logf("a session with %d namespaces is checked in %v", v1alpha1.MaxReach, time.Since(start).Round(time.Millisecond))
	if _, err := w.user.sessions().Create(ctx, reaching(w.user, false, append(full(-1), workNS)...), dryRun); !apierrors.IsInvalid(err) {
		t.Errorf("more namespaces than are checked: %v", err)
	}

	s := ok(w.user.sessions().Create(ctx, reaching(w.user, false, workNS), metav1.CreateOptions{}))(t)
	if err := patch(ctx, w.user.sessions(), s.GetName(), `{"spec":{"reach":{"namespaces":["`+otherNS+`"]}}}`); !apierrors.IsForbidden(err) {
		t.Errorf("a session's reach was changed: %v", err)
	}
	if err := patch(ctx, w.user.sessions(), s.GetName(), renewBody(stamp(time.Second))); err != nil {
		t.Errorf("renew: %v", err)
	}
	if err := patch(ctx, w.manager.of("Session"), s.GetName(), `{"status":{"state":"Connected"}}`, "status"); err != nil {
		t.Errorf("the manager, who has no such right, writes the status: %v", err)
	}
	// Rights taken away: no renewal any more.
	binds := ok(w.core.RbacV1().RoleBindings(workNS).List(ctx, metav1.ListOptions{}))(t)
	for _, b := range binds.Items {
		if b.RoleRef.Name == "doppel-intercept" {
			if err := w.core.RbacV1().RoleBindings(workNS).Delete(ctx, b.Name, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	n := 1
	eventually(t, 10*time.Second, func() error {
		n++
		err := patch(ctx, w.user.sessions(), s.GetName(), renewBody(stamp(time.Duration(n)*time.Second)))
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "needs the right to connect") {
			return fmt.Errorf("renewed without the right: %w", errors.Join(err))
		}
		return nil
	})
	w.bind(t, workNS, "ClusterRole", "doppel-intercept", w.user)
	if err := w.user.sessions().Delete(ctx, s.GetName(), metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

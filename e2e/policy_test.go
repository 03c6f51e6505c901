package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// attack is something that must be refused with the policy and must get through without it, or it proves nothing about the policy.
type attack struct {
	name string
	// kinds are Session, Intercept; empty means both.
	kinds []string
	// want is a part of the denial.
	want string
	// run attacks; the victim is a fresh object of kind that belongs to alice.
	run func(ctx context.Context, w *policyWorld, kind string, victim *unstructured.Unstructured) error
}

var sessionOnly = []string{"Session"}

// ownPatch and foreignPatch are attacks by JSON merge patch: alice's on her own object, bob's on hers.
func ownPatch(body string) func(context.Context, *policyWorld, string, *unstructured.Unstructured) error {
	return func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
		return patch(ctx, w.alice.of(kind), v.GetName(), body)
	}
}

func foreignPatch(body string) func(context.Context, *policyWorld, string, *unstructured.Unstructured) error {
	return func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
		return patch(ctx, w.bob.of(kind), v.GetName(), body)
	}
}

// create lets p create an honest object after change.
func create(ctx context.Context, p person, kind string, change func(o *unstructured.Unstructured)) error {
	o := object(kind, p)
	change(o)
	_, err := p.of(kind).Create(ctx, o, metav1.CreateOptions{})
	return err
}

const (
	ownerRef = `[{"apiVersion":"v1","kind":"ConfigMap","name":"x","uid":"00000000-0000-0000-0000-000000000001"}]`
	future   = 100 * 24 * time.Hour
)

func attacks() []attack {
	return []attack{
		// Creating.
		{name: "create in another's name", want: "must be the name by which this cluster knows you", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			_, err := w.bob.of(kind).Create(ctx, object(kind, w.alice), metav1.CreateOptions{})
			return err
		}},
		{name: "administrator creates in another's name", want: "must be the name", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			_, err := w.admin.of(kind).Create(ctx, object(kind, w.alice), metav1.CreateOptions{})
			return err
		}},
		{name: "manager creates in another's name", want: "must be the name", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			_, err := w.manager.of(kind).Create(ctx, object(kind, w.alice), metav1.CreateOptions{})
			return err
		}},
		{name: "take over without the right", kinds: []string{"Intercept"}, want: "right to takeover", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			return create(ctx, w.bob, kind, func(o *unstructured.Unstructured) {
				_ = unstructured.SetNestedField(o.Object, true, "spec", "takeover")
			})
		}},
		{name: "create in another's name by apply", want: "must be the name", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			o := object(kind, w.alice)
			o.SetGenerateName("")
			o.SetName(fmt.Sprintf("applied-%d", time.Now().UnixNano()))
			_, err := w.bob.of(kind).Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "x"})
			return err
		}},
		{name: "re-use a name", kinds: sessionOnly, want: "generateName", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			if err := w.alice.of(kind).Delete(ctx, v.GetName(), metav1.DeleteOptions{}); err != nil {
				return err
			}
			return create(ctx, w.bob, kind, func(o *unstructured.Unstructured) { o.SetGenerateName(""); o.SetName(v.GetName()) })
		}},
		{name: "choose a name beside generateName", kinds: sessionOnly, want: "generateName", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			return create(ctx, w.bob, kind, func(o *unstructured.Unstructured) { o.SetName(fmt.Sprintf("mine-%d", time.Now().UnixNano())) })
		}},
		{name: "create with a finalizer", want: "finalizers or ownerReferences", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			return create(ctx, w.bob, kind, func(o *unstructured.Unstructured) { o.SetFinalizers([]string{"example.com/stay"}) })
		}},
		{name: "create with an owner", want: "finalizers or ownerReferences", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			return create(ctx, w.bob, kind, func(o *unstructured.Unstructured) {
				o.SetOwnerReferences([]metav1.OwnerReference{{APIVersion: v.GetAPIVersion(), Kind: v.GetKind(), Name: v.GetName(), UID: v.GetUID()}})
			})
		}},
		{name: "create in another namespace", kinds: sessionOnly, want: "sessions live in", run: func(ctx context.Context, w *policyWorld, _ string, _ *unstructured.Unstructured) error {
			_, err := w.bob.dyn.Resource(sessionsGVR).Namespace(workNS).Create(ctx, object("Session", w.bob), metav1.CreateOptions{})
			return err
		}},
		{name: "create renewed in the future", kinds: sessionOnly, want: "current time", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			return create(ctx, w.bob, kind, setRenew(stamp(future)))
		}},
		{name: "create six minutes ahead", kinds: sessionOnly, want: "current time", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			return create(ctx, w.bob, kind, setRenew(stamp(6*time.Minute)))
		}},
		{name: "create renewed in the past", kinds: sessionOnly, want: "current time", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			return create(ctx, w.bob, kind, setRenew(stamp(-time.Hour)))
		}},

		// Deleting.
		{name: "delete another's", want: "right to revoke", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			return w.bob.of(kind).Delete(ctx, v.GetName(), metav1.DeleteOptions{})
		}},
		{name: "delete another's and take its name", want: "right to revoke", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			if err := w.bob.of(kind).Delete(ctx, v.GetName(), metav1.DeleteOptions{}); err != nil {
				return err
			}
			return create(ctx, w.bob, kind, func(o *unstructured.Unstructured) { o.SetGenerateName(""); o.SetName(v.GetName()) })
		}},
		{name: "delete a collection that holds another's", want: "right to revoke", run: func(ctx context.Context, w *policyWorld, kind string, _ *unstructured.Unstructured) error {
			return w.bob.of(kind).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
		}},
		{name: "delete another's in the foreground", want: "right to revoke", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			fg := metav1.DeletePropagationForeground
			return w.bob.of(kind).Delete(ctx, v.GetName(), metav1.DeleteOptions{PropagationPolicy: &fg})
		}},

		// Another's object.
		{name: "turn another's traffic to oneself", kinds: sessionOnly, want: "only they may change it", run: foreignPatch(`{"spec":{"key":"sha256:bob"}}`)},
		{name: "turn another's intercept to one's session", kinds: []string{"Intercept"}, want: "only they may change it", run: foreignPatch(`{"spec":{"session":"bob"}}`)},
		{name: "renew another's", kinds: sessionOnly, want: "only they may change it", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			return patch(ctx, w.bob.of(kind), v.GetName(), renewBody(stamp(time.Second)))
		}},
		{name: "hold another's with a finalizer", want: "only they may change it", run: foreignPatch(`{"metadata":{"finalizers":["example.com/stay"]}}`)},
		{name: "put an owner over another's", want: "only they may change it", run: foreignPatch(`{"metadata":{"ownerReferences":` + ownerRef + `}}`)},
		{name: "label another's", want: "only they may change it", run: foreignPatch(`{"metadata":{"labels":{"app.kubernetes.io/instance":"prune-me"}}}`)},
		{name: "annotate another's", want: "only they may change it", run: foreignPatch(`{"metadata":{"annotations":{"a":"b"}}}`)},
		{name: "forge another's managedFields", want: "only they may change it", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			o := v.DeepCopy()
			o.SetManagedFields(forged(20))
			_, err := w.bob.of(kind).Update(ctx, o, metav1.UpdateOptions{})
			return err
		}},

		// One's own object.
		{name: "give one's own to another", want: "can", run: ownPatch(`{"spec":{"user":"system:serviceaccount:` + otherNS + `:bob"}}`)},
		{name: "change one's own key", kinds: sessionOnly, want: "only spec.renewTime", run: ownPatch(`{"spec":{"key":"sha256:other"}}`)},
		{name: "change one's own namespace", kinds: sessionOnly, want: "only spec.renewTime", run: ownPatch(`{"spec":{"namespace":"kube-system"}}`)},
		{name: "take a field out of one's own", kinds: sessionOnly, want: "only spec.renewTime", run: ownPatch(`{"spec":{"namespace":null}}`)},
		{name: "turn one's own to another workload", kinds: []string{"Intercept"}, want: "leave and create another", run: ownPatch(`{"spec":{"workload":{"name":"other"}}}`)},
		{name: "turn one's own to another session", kinds: []string{"Intercept"}, want: "leave and create another", run: ownPatch(`{"spec":{"session":"other"}}`)},
		{name: "add a field to one's own", kinds: []string{"Intercept"}, want: "leave and create another", run: ownPatch(`{"spec":{"container":"sidecar"}}`)},
		{name: "hold one's own with a finalizer", want: "finalizers", run: ownPatch(`{"metadata":{"finalizers":["example.com/stay"]}}`)},
		{name: "put an owner over one's own", want: "finalizers and ownerReferences", run: ownPatch(`{"metadata":{"ownerReferences":` + ownerRef + `}}`)},
		{name: "label one's own", want: "labels and annotations", run: ownPatch(`{"metadata":{"labels":{"app.kubernetes.io/instance":"x"}}}`)},
		{name: "annotate one's own", want: "labels and annotations", run: ownPatch(`{"metadata":{"annotations":{"a":"b"}}}`)},

		// renewTime.
		{name: "renew backwards", kinds: sessionOnly, want: "only move forward", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			return patch(ctx, w.alice.of(kind), v.GetName(), renewBody(stamp(-time.Minute)))
		}},
		{name: "renew into the future", kinds: sessionOnly, want: "ahead of the cluster's clock", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			return patch(ctx, w.alice.of(kind), v.GetName(), renewBody(stamp(future)))
		}},
		{name: "renew six minutes ahead", kinds: sessionOnly, want: "ahead of the cluster's clock", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			return patch(ctx, w.alice.of(kind), v.GetName(), renewBody(stamp(6*time.Minute)))
		}},
		{name: "renew into the future by apply", kinds: sessionOnly, want: "ahead of the cluster's clock", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			o := map[string]any{"apiVersion": v.GetAPIVersion(), "kind": kind, "metadata": map[string]any{"name": v.GetName()}, "spec": map[string]any{"renewTime": stamp(future)}}
			body, err := json.Marshal(o)
			if err != nil {
				return err
			}
			force := true
			_, err = w.alice.of(kind).Patch(ctx, v.GetName(), types.ApplyPatchType, body, metav1.PatchOptions{FieldManager: "x", Force: &force})
			return err
		}},
		{name: "renew into the future with one forged managedFields entry", kinds: sessionOnly, want: "ahead of the cluster's clock", run: forgedRenewal(1)},
		{name: "renew into the future with so many forged managedFields that one's own is merged", kinds: sessionOnly, want: "ahead of the cluster's clock", run: forgedRenewal(20)},
		{name: "renew into the future without managedFields", kinds: sessionOnly, want: "ahead of the cluster's clock", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			o := v.DeepCopy()
			setRenew(stamp(future))(o)
			o.SetManagedFields([]metav1.ManagedFieldsEntry{})
			_, err := w.alice.of(kind).Update(ctx, o, metav1.UpdateOptions{})
			return err
		}},
		{name: "renew into the future with managedFields that do not parse", kinds: sessionOnly, want: "ahead of the cluster's clock", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			o := v.DeepCopy()
			setRenew(stamp(future))(o)
			f := forged(1)
			f[0].FieldsV1.SetRawString(`{"x:spec":{}}`)
			o.SetManagedFields(f)
			_, err := w.alice.of(kind).Update(ctx, o, metav1.UpdateOptions{})
			return err
		}},
		{name: "manager renews a session", kinds: sessionOnly, want: "can renew", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			return patch(ctx, w.manager.of(kind), v.GetName(), renewBody(stamp(time.Minute)))
		}},
		{name: "manager changes a session's key", kinds: sessionOnly, want: "only spec.renewTime", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			return patch(ctx, w.manager.of(kind), v.GetName(), `{"spec":{"key":"sha256:manager"}}`)
		}},

		// Status.
		{name: "write the status of one's own", want: "only the traffic-manager writes the status", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			return patch(ctx, w.alice.of(kind), v.GetName(), `{"status":{"state":"Connected","message":"x"}}`, "status")
		}},
		{name: "write the status of another's", want: "only the traffic-manager writes the status", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			o := v.DeepCopy()
			o.Object["status"] = map[string]any{"state": "Failed"}
			_, err := w.bob.of(kind).UpdateStatus(ctx, o, metav1.UpdateOptions{})
			return err
		}},
		{name: "administrator writes a status", want: "only the traffic-manager writes the status", run: func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
			return patch(ctx, w.admin.of(kind), v.GetName(), `{"status":{"state":"Connected"}}`, "status")
		}},
	}
}

func setRenew(v string) func(*unstructured.Unstructured) {
	return func(o *unstructured.Unstructured) { o.Object["spec"].(map[string]any)["renewTime"] = v }
}

func renewBody(v string) string { return `{"spec":{"renewTime":"` + v + `"}}` }

// forged are n entries that say they own renewTime since a time in the future, and another field, with which they outlive the loss
// of renewTime to whoever changes it: beyond ten entries the API server merges the oldest, which is then the honest one.
func forged(n int) []metav1.ManagedFieldsEntry {
	var f []metav1.ManagedFieldsEntry
	for i := range n {
		at := metav1.NewTime(time.Now().Add(2 * future).Add(time.Duration(i) * time.Second))
		fields := &metav1.FieldsV1{}
		fields.SetRawString(`{"f:spec":{"f:user":{},"f:renewTime":{}}}`)
		f = append(f, metav1.ManagedFieldsEntry{
			Manager: fmt.Sprintf("forged-%d", i), Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "doppel.dev/v1alpha1",
			FieldsType: "FieldsV1", FieldsV1: fields, Time: &at,
		})
	}
	return f
}

// forgedRenewal renews into the future while pretending that somebody did so in the future.
func forgedRenewal(n int) func(context.Context, *policyWorld, string, *unstructured.Unstructured) error {
	return func(ctx context.Context, w *policyWorld, kind string, v *unstructured.Unstructured) error {
		o := v.DeepCopy()
		setRenew(stamp(future))(o)
		o.SetManagedFields(append(forged(n), v.GetManagedFields()...))
		_, err := w.alice.of(kind).Update(ctx, o, metav1.UpdateOptions{})
		return err
	}
}

// TestPolicy runs every attack twice: without the policy, where it must get through, and with it, where it must be refused and leave
// its victim as it was. Then it checks that what honest people and Kubernetes itself do still works.
func TestPolicy(t *testing.T) {
	w := newPolicyWorld(t)

	run := func(t *testing.T, guarded bool) {
		for _, a := range attacks() {
			kinds := a.kinds
			if kinds == nil {
				kinds = []string{"Session", "Intercept"}
			}
			for _, kind := range kinds {
				t.Run(kind+"/"+a.name, func(t *testing.T) { w.attack(t, a, kind, guarded) })
			}
		}
	}
	w.guard(t, false)
	t.Run("attacks succeed without the policy", func(t *testing.T) { run(t, false) })
	t.Run("the webhook without the policy", func(t *testing.T) { w.webhook(t, false) })
	w.wipe(t)
	w.guard(t, true)
	t.Run("attacks fail with the policy", func(t *testing.T) { run(t, true) })
	t.Run("the webhook with the policy", func(t *testing.T) { w.webhook(t, true) })
	t.Run("expressions are well typed", w.typed)
	t.Run("honest people", w.honest)
	t.Run("revoke", w.revoke)
	t.Run("manager", w.managers)
	t.Run("garbage collector", w.collector)
	t.Run("reach", w.reach)
	t.Run("users have what they need and no more", w.users)
	t.Run("namespace goes away", w.namespaceGoes)
	t.Run("back without the policy", func(t *testing.T) {
		w.guard(t, false)
		w.attack(t, attacks()[0], "Session", false)
	})
}

func (w *policyWorld) attack(t *testing.T, a attack, kind string, guarded bool) {
	ctx := t.Context()
	victim := ok(w.alice.of(kind).Create(ctx, object(kind, w.alice), metav1.CreateOptions{}))(t)
	err := a.run(ctx, w, kind, victim)
	if !guarded {
		if err != nil {
			t.Fatalf("it fails even without the policy, so it shows nothing: %v", err)
		}
		return
	}
	if err == nil {
		t.Fatal("it got through")
	}
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "ValidatingAdmissionPolicy 'doppel-identity-") || !strings.Contains(err.Error(), a.want) {
		t.Fatalf("not refused as it should: %v\nwant %q", err, a.want)
	}
	if strings.HasPrefix(a.name, "re-use") {
		return // alice herself deleted it
	}
	now, err := w.alice.of(kind).Get(ctx, victim.GetName(), metav1.GetOptions{})
	if err != nil {
		t.Fatalf("the victim is gone: %v", err)
	}
	if now.GetResourceVersion() != victim.GetResourceVersion() || now.GetUID() != victim.GetUID() {
		t.Errorf("the victim was changed: %v", now.Object)
	}
}

// webhook has the manager's account change its webhook's configuration in dry runs: the certificate's authority and nothing else, with the policy.
func (w *policyWorld) webhook(t *testing.T, guarded bool) {
	w.apply(t, "webhook.yaml")
	defer w.remove(t, "webhook.yaml")
	hooks := w.manager.dyn.Resource(admissionv1.SchemeGroupVersion.WithResource("mutatingwebhookconfigurations"))
	for name, row := range map[string]struct {
		patch string
		harm  bool
	}{
		"authority": {`[{"op":"add","path":"/webhooks/0/clientConfig/caBundle","value":""},{"op":"add","path":"/webhooks/1/clientConfig/caBundle","value":""}]`, false},
		"rules":     {`[{"op":"replace","path":"/webhooks/0/rules/0/resources","value":["*"]}]`, true},
		"more rules": {`[{"op":"add","path":"/webhooks/0/rules/-","value":
			{"apiGroups":[""],"apiVersions":["v1"],"operations":["*"],"resources":["secrets"]}}]`, true},
		"selector":   {`[{"op":"replace","path":"/webhooks/0/namespaceSelector","value":{}}]`, true},
		"address":    {`[{"op":"replace","path":"/webhooks/0/clientConfig","value":{"url":"https://evil.example/"}}]`, true},
		"service":    {`[{"op":"replace","path":"/webhooks/0/clientConfig/service/namespace","value":"default"}]`, true},
		"failures":   {`[{"op":"replace","path":"/webhooks/0/failurePolicy","value":"Fail"}]`, true},
		"conditions": {`[{"op":"remove","path":"/webhooks/0/matchConditions"}]`, true},
		"another": {`[{"op":"add","path":"/webhooks/-","value":
			{"name":"more.doppel.dev","clientConfig":{"url":"https://evil.example/"},"admissionReviewVersions":["v1"],"sideEffects":"None","rules":[]}}]`, true},
		"fewer": {`[{"op":"remove","path":"/webhooks/1"}]`, true},
	} {
		t.Run(name, func(t *testing.T) {
			eventually(t, 10*time.Second, func() error { // the policy, and the right, may have just been made
				_, err := hooks.Patch(t.Context(), "doppel-agent-injector-"+policyNS, types.JSONPatchType, []byte(row.patch), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
				switch {
				case !row.harm || !guarded:
					return err
				case err == nil:
					return errors.New("it got through")
				case !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "nothing of its webhook but"):
					return fmt.Errorf("not refused as it should: %w", err)
				}
				return nil
			})
		})
	}
}

// wipe removes all objects, whatever hangs on them; only without the policy.
func (w *policyWorld) wipe(t *testing.T) {
	t.Helper()
	ctx := context.Background() // also when the test is over
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		left := 0
		for _, gvr := range []schema.GroupVersionResource{sessionsGVR, interceptsGVR} {
			for _, ns := range []string{policyNS, workNS, otherNS} {
				r := w.dyn.Resource(gvr).Namespace(ns)
				l, err := r.List(ctx, metav1.ListOptions{})
				if err != nil {
					t.Errorf("wipe: %v", err)
					return
				}
				left += len(l.Items)
				for _, o := range l.Items {
					if len(o.GetFinalizers()) > 0 {
						_ = patch(ctx, r, o.GetName(), `{"metadata":{"finalizers":null}}`)
					}
					_ = r.Delete(ctx, o.GetName(), metav1.DeleteOptions{})
				}
			}
		}
		if left == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("wipe: %d objects stay", left)
			return
		}
	}
}

// typed asks the API server what its type checker says about the expressions.
func (w *policyWorld) typed(t *testing.T) {
	w.apply(t, "policy-reach.yaml")
	defer w.remove(t, "policy-reach.yaml")
	names := []string{"doppel-identity-sessions", "doppel-identity-intercepts"}
	for part := range 8 {
		names = append(names, fmt.Sprintf("doppel-reach-%d", part))
	}
	for _, name := range names {
		eventually(t, 30*time.Second, func() error {
			p, err := w.dyn.Resource(policiesGVR).Get(t.Context(), name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			seen, _, _ := unstructured.NestedInt64(p.Object, "status", "observedGeneration")
			if seen < p.GetGeneration() {
				return errors.New("not checked yet")
			}
			if warnings, found, _ := unstructured.NestedSlice(p.Object, "status", "typeChecking", "expressionWarnings"); found {
				t.Fatalf("%s: %v", name, warnings)
			}
			return nil
		})
	}
}

// honest does what the laptop does, as people of different kinds.
func (w *policyWorld) honest(t *testing.T) {
	ctx := t.Context()
	for _, p := range []person{w.alice, w.odd()} {
		s := ok(p.sessions().Create(ctx, object("Session", p), metav1.CreateOptions{}))(t)
		if !strings.HasPrefix(s.GetName(), "laptop-") {
			t.Errorf("name %s", s.GetName())
		}
		for i := range 3 { // by merge patch, as the laptop does
			if err := patch(ctx, p.sessions(), s.GetName(), renewBody(stamp(time.Duration(i+1)*time.Second))); err != nil {
				t.Fatalf("%s renews: %v", p.name, err)
			}
		}
		s = ok(p.sessions().Get(ctx, s.GetName(), metav1.GetOptions{}))(t)
		setRenew(stamp(10 * time.Second))(s)
		s = ok(p.sessions().Update(ctx, s, metav1.UpdateOptions{}))(t) // and by update
		if err := patch(ctx, p.sessions(), s.GetName(), `{}`); err != nil {
			t.Errorf("%s changes nothing: %v", p.name, err)
		}
		i := ok(p.intercepts().Create(ctx, object("Intercept", p), metav1.CreateOptions{}))(t)
		for _, err := range []error{
			p.intercepts().Delete(ctx, i.GetName(), metav1.DeleteOptions{}),
			p.sessions().Delete(ctx, s.GetName(), metav1.DeleteOptions{}),
		} {
			if err != nil {
				t.Errorf("%s deletes their own: %v", p.name, err)
			}
		}
	}
	// Status at creation is dropped by the API server, so it needs no rule.
	o := object("Session", w.alice)
	o.Object["status"] = map[string]any{"state": "Connected", "address": "10.0.0.1:1"}
	s := ok(w.alice.sessions().Create(ctx, o, metav1.CreateOptions{}))(t)
	if state, found, _ := unstructured.NestedString(s.Object, "status", "state"); found {
		t.Errorf("status.state %q was set at creation", state)
	}
	// A name may look re-used only by way of a prefix; the UID is another.
	if err := w.alice.sessions().Delete(ctx, s.GetName(), metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	again := object("Session", w.bob)
	again.SetName(s.GetName())
	b := ok(w.bob.sessions().Create(ctx, again, metav1.CreateOptions{}))(t)
	if b.GetUID() == s.GetUID() {
		t.Error("the same UID")
	}
}

// revoke is the right to end what belongs to others, which can be given for a namespace.
func (w *policyWorld) revoke(t *testing.T) {
	ctx := t.Context()
	for _, kind := range []string{"Session", "Intercept"} {
		v := ok(w.alice.of(kind).Create(ctx, object(kind, w.alice), metav1.CreateOptions{}))(t)
		if err := w.carol.of(kind).Delete(ctx, v.GetName(), metav1.DeleteOptions{}); err != nil {
			t.Errorf("with the right: %v", err)
		}
		v = ok(w.alice.of(kind).Create(ctx, object(kind, w.alice), metav1.CreateOptions{}))(t)
		if err := w.admin.of(kind).Delete(ctx, v.GetName(), metav1.DeleteOptions{}); err != nil {
			t.Errorf("administrator: %v", err)
		}
		v = ok(w.alice.of(kind).Create(ctx, object(kind, w.alice), metav1.CreateOptions{}))(t)
		if err := w.carol.of(kind).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
			t.Errorf("a collection: %v", err)
		}
		if _, err := w.alice.of(kind).Get(ctx, v.GetName(), metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("after deletecollection: %v", err)
		}
		// revoke gives no right to change.
		v = ok(w.alice.of(kind).Create(ctx, object(kind, w.alice), metav1.CreateOptions{}))(t)
		if err := patch(ctx, w.carol.of(kind), v.GetName(), `{"metadata":{"finalizers":["example.com/stay"]}}`); !apierrors.IsForbidden(err) {
			t.Errorf("revoke let carol put a finalizer on another's: %v", err)
		}
	}
	// The right can be given for a single object.
	one := ok(w.alice.intercepts().Create(ctx, object("Intercept", w.alice), metav1.CreateOptions{}))(t)
	two := ok(w.alice.intercepts().Create(ctx, object("Intercept", w.alice), metav1.CreateOptions{}))(t)
	ok(w.core.RbacV1().Roles(workNS).Create(ctx, &rbacv1.Role{
		ObjectMeta: metav1.ObjectMeta{Name: "revoke-one"},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{"doppel.dev"}, Resources: []string{"intercepts"}, ResourceNames: []string{one.GetName()}, Verbs: []string{"revoke"}}},
	}, metav1.CreateOptions{}))(t)
	w.bind(t, workNS, "Role", "revoke-one", w.bob)
	eventually(t, 10*time.Second, func() error {
		return w.bob.intercepts().Delete(ctx, one.GetName(), metav1.DeleteOptions{})
	})
	if err := w.bob.intercepts().Delete(ctx, two.GetName(), metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("with the right to revoke another object: %v", err)
	}
	// carol's right ends at the namespace's border.
	o := ok(w.alice.dyn.Resource(interceptsGVR).Namespace(otherNS).Create(ctx, object("Intercept", w.alice), metav1.CreateOptions{}))(t)
	err := w.carol.dyn.Resource(interceptsGVR).Namespace(otherNS).Delete(ctx, o.GetName(), metav1.DeleteOptions{})
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "right to revoke") {
		t.Errorf("in a namespace where carol may not revoke: %v", err)
	}
}

// managers checks what the traffic-manager does under its own name.
func (w *policyWorld) managers(t *testing.T) {
	ctx := t.Context()
	for _, kind := range []string{"Session", "Intercept"} {
		v := ok(w.alice.of(kind).Create(ctx, object(kind, w.alice), metav1.CreateOptions{}))(t)
		if err := patch(ctx, w.manager.of(kind), v.GetName(), `{"status":{"state":"Lost","message":"m"}}`, "status"); err != nil {
			t.Errorf("status by patch: %v", err)
		}
		v = ok(w.manager.of(kind).Get(ctx, v.GetName(), metav1.GetOptions{}))(t)
		v.Object["status"] = map[string]any{"state": "Pending"}
		v = ok(w.manager.of(kind).UpdateStatus(ctx, v, metav1.UpdateOptions{}))(t)
		if err := patch(ctx, w.manager.of(kind), v.GetName(), `{"metadata":{"finalizers":["doppel.dev/restore"]}}`); err != nil {
			t.Errorf("a finalizer of its own: %v", err)
		}
		if kind == "Session" { // renewing goes on beside what the manager writes
			if err := patch(ctx, w.alice.of(kind), v.GetName(), renewBody(stamp(time.Second))); err != nil {
				t.Errorf("renew: %v", err)
			}
		}
		if err := patch(ctx, w.alice.of(kind), v.GetName(), `{"metadata":{"finalizers":null}}`); !apierrors.IsForbidden(err) {
			t.Errorf("a user removed the manager's finalizer: %v", err)
		}
		if err := patch(ctx, w.manager.of(kind), v.GetName(), `{"metadata":{"finalizers":null}}`); err != nil {
			t.Errorf("take its finalizer away: %v", err)
		}
		if err := w.manager.of(kind).Delete(ctx, v.GetName(), metav1.DeleteOptions{}); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
}

// collector deletes in the foreground, which leaves a finalizer that only the garbage collector can take away.
func (w *policyWorld) collector(t *testing.T) {
	ctx := t.Context()
	for _, policy := range []metav1.DeletionPropagation{metav1.DeletePropagationForeground, metav1.DeletePropagationOrphan} {
		for _, kind := range []string{"Session", "Intercept"} {
			v := ok(w.alice.of(kind).Create(ctx, object(kind, w.alice), metav1.CreateOptions{}))(t)
			if err := w.alice.of(kind).Delete(ctx, v.GetName(), metav1.DeleteOptions{PropagationPolicy: &policy}); err != nil {
				t.Fatalf("%s: %v", policy, err)
			}
			// The collector looks for new kinds of objects every 30 s only.
			eventually(t, 90*time.Second, func() error {
				o, err := w.alice.of(kind).Get(ctx, v.GetName(), metav1.GetOptions{})
				if apierrors.IsNotFound(err) {
					return nil
				}
				return fmt.Errorf("%s %s is still there: %v %w", policy, kind, o, err)
			})
		}
	}
}

// users checks the chart's own roles, without the extras of alice and bob.
func (w *policyWorld) users(t *testing.T) {
	ctx := t.Context()
	s := ok(w.user.sessions().Create(ctx, object("Session", w.user), metav1.CreateOptions{}))(t)
	if err := patch(ctx, w.user.sessions(), s.GetName(), renewBody(stamp(time.Second))); err != nil {
		t.Errorf("renew: %v", err)
	}
	i := ok(w.user.intercepts().Create(ctx, object("Intercept", w.user), metav1.CreateOptions{}))(t)
	ok(w.user.intercepts().List(ctx, metav1.ListOptions{}))(t)
	for what, err := range map[string]error{
		"delete the session":   w.user.sessions().Delete(ctx, s.GetName(), metav1.DeleteOptions{}),
		"delete the intercept": w.user.intercepts().Delete(ctx, i.GetName(), metav1.DeleteOptions{}),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	forbidden := map[string]error{}
	_, forbidden["list sessions"] = w.user.sessions().List(ctx, metav1.ListOptions{})
	_, forbidden["watch sessions"] = w.user.sessions().Watch(ctx, metav1.ListOptions{})
	forbidden["delete all sessions"] = w.user.sessions().DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
	_, forbidden["create a session elsewhere"] = w.user.dyn.Resource(sessionsGVR).Namespace(workNS).Create(ctx, object("Session", w.user), metav1.CreateOptions{})
	_, forbidden["create an intercept elsewhere"] = w.user.dyn.Resource(interceptsGVR).Namespace(otherNS).Create(ctx, object("Intercept", w.user), metav1.CreateOptions{})
	_, forbidden["read the manager's Secret"] = w.user.dyn.Resource(secretsGVR).Namespace(policyNS).Get(ctx, "traffic-manager", metav1.GetOptions{})
	for what, err := range forbidden {
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v, want forbidden", what, err)
		}
	}
	// Rights taken away end renewing at once; the manager ends the session when renewals stay out.
	s = ok(w.user.sessions().Create(ctx, object("Session", w.user), metav1.CreateOptions{}))(t)
	binds := ok(w.core.RbacV1().RoleBindings(policyNS).List(ctx, metav1.ListOptions{}))(t)
	for _, b := range binds.Items {
		if b.RoleRef.Name == "doppel-connect" {
			if err := w.core.RbacV1().RoleBindings(policyNS).Delete(ctx, b.Name, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	eventually(t, 10*time.Second, func() error {
		if err := patch(ctx, w.user.sessions(), s.GetName(), renewBody(stamp(2*time.Second))); !apierrors.IsForbidden(err) {
			return fmt.Errorf("renewed without rights: %w", err)
		}
		return nil
	})
}

// namespaceGoes deletes a namespace that holds intercepts of people who are gone.
func (w *policyWorld) namespaceGoes(t *testing.T) {
	ctx := t.Context()
	const ns = "doppel-policy-gone"
	w.mustNamespace(t, ns)
	for _, p := range []person{w.alice, w.bob} {
		ok(p.dyn.Resource(interceptsGVR).Namespace(ns).Create(ctx, object("Intercept", p), metav1.CreateOptions{}))(t)
	}
	if err := w.core.CoreV1().Namespaces().Delete(ctx, ns, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, func() error {
		n, err := w.core.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("still there: %v %w", n.Status.Conditions, err)
	})
}
